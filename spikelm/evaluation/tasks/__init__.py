"""Tasks of lm-evaluation-harness. Importing this package needs no lm_eval; its modules load it when used."""
