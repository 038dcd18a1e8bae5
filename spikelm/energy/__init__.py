"""The energy ledger: operations, bytes, estimated energy and measured time of a model. See docs/energy.md."""
