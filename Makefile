# SpikeLM: `make` lists what can be done. Needs Python >= 3.11 and make; everything else is installed in .venv.

VENV      := .venv
BIN       := $(VENV)/bin
JOBS      ?= 2
TEST_ARGS ?=

# The first Python that is new enough; override with `make PYTHON=/path/to/python3 ...`.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)

comma := ,
# Where no GPU answers, torch is pinned to its CPU build: an open range would take 3 GB of CUDA.
GPU  := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
PINS := $(if $(GPU),,--constraint constraints/cpu.txt)
CORE_SPEC := .$(if $(GPU),[gpu])
DEV_SPEC  := $(if $(GPU),.[dev$(comma)train$(comma)gpu],.[dev$(comma)train])

# What is installed is remembered by the contents of the files that decide it, so a second run installs nothing.
KEY  := $(shell cat pyproject.toml constraints/*.txt | cksum | cut -d' ' -f1)$(GPU)
CORE := $(VENV)/.installed-core-$(KEY)
DEV  := $(VENV)/.installed-dev-$(KEY)

# Tests: one thread a process (more are slower on busy cores), no network, data beside the checkout if it is there.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
ifndef SPIKELM_DATA
ifneq ($(wildcard ../shared/data/.),)
TEST_ENV += SPIKELM_DATA=$(abspath ../shared/data)
endif
endif

# What uses the device; needs torch, triton and pytest alone.
GPU_TESTS := tests/kernels/triton tests/test_gpu.py tests/test_graph_decoding.py

.DEFAULT_GOAL := help
.PHONY: help demo reproduce test test-slow check bench gpu clean soak

help: ## list the targets
	@echo "SpikeLM: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(CORE) ## train a spiking language model and its twin on real text, measure both, let them write
	@echo "== demo: training, measuring and writing (about eight minutes on two cores) =="
	@$(BIN)/spikelm demo

reproduce: $(CORE) ## list the recipes with their cost; RECIPE=name runs one (ARGS="key=value ..." changes it)
ifdef RECIPE
	@if [ -f configs/finetune/$(RECIPE).yaml ]; then $(BIN)/spikelm finetune $(RECIPE) $(ARGS); \
	else $(BIN)/spikelm train $(RECIPE) $(ARGS); fi
else
	@$(BIN)/spikelm plan
endif

test: $(DEV) ## run the tests (without those marked slow)
	@echo "== test: pytest in $(JOBS) processes =="
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TEST_ARGS)

test-slow: $(DEV) ## run the tests marked slow
	@echo "== test-slow: pytest -m slow =="
	@$(TEST_ENV) $(BIN)/python -m pytest -m slow $(TEST_ARGS)

soak: $(DEV) ## kill training at random moments, 50 times on one and on two ranks
	@echo "== soak: runs that are killed come to the same end (about half an hour) =="
	@$(TEST_ENV) $(BIN)/python scripts/soak_checkpoints.py --rounds 50 --ranks 1 --ranks 2 \
		--json benchmarks/results/soak_checkpoints.json

check: $(DEV) ## lint, formatting and types
	@echo "== check: ruff, ruff format, mypy --strict =="
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(DEV) ## run the benchmarks; results go to benchmarks/results
	@echo "== bench: spikelm bench, then every file of benchmarks/ in turn (keep the machine otherwise idle) =="
	@OMP_NUM_THREADS=1 $(BIN)/spikelm bench kernels --json benchmarks/results/kernels_cpu.json
	@OMP_NUM_THREADS=1 $(BIN)/spikelm bench decode --json benchmarks/results/decode.json
	@$(BIN)/spikelm bench train --json benchmarks/results/train_step.json
	@for file in benchmarks/[!_]*.py; do echo "-- $$file"; $(BIN)/python "$$file" || exit 1; done

# No installation here: a GPU machine may have no network, and the kernels need torch and triton alone.
gpu: ## test the kernels on this machine's GPU and measure them, with the Python that has torch
	@python=$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON)); \
	if $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		echo "== gpu: tests =="; $(TEST_ENV) PYTHONPATH=$(CURDIR) $$python -m pytest -m gpu $(GPU_TESTS) $(TEST_ARGS) && \
		{ echo "== gpu: benchmarks =="; PYTHONPATH=$(CURDIR) $$python benchmarks/gpu.py; }; \
	else echo "No GPU that torch can use on this machine, so there is nothing to run."; fi

clean: ## remove built files and caches (keeps .venv and runs)
	@echo "== clean: build/, dist/, *.egg-info and tool caches =="
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "SpikeLM needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python3)." >&2; exit 1; }
	@echo "== creating $(VENV) with $(PYTHON) =="
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot create a virtual environment; on Debian: apt install python3-venv." >&2; rm -rf $(VENV); exit 1; }

# Only the package and its parts, not the tools: enough for the demo. A development install includes it.
$(CORE): | $(BIN)/python
	@if [ ! -e $(DEV) ]; then \
		echo "== installing SpikeLM ($(if $(GPU),GPU,no GPU: constraints/cpu.txt); minutes the first time) =="; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --editable '$(CORE_SPEC)'; fi
	@rm -f $(VENV)/.installed-core-* && touch $@

$(DEV): | $(BIN)/python
	@echo "== installing SpikeLM and its development tools ($(if $(GPU),GPU,no GPU: constraints/cpu.txt); minutes the first time) =="
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) --editable '$(DEV_SPEC)'
	@rm -f $(VENV)/.installed-dev-* && touch $@
