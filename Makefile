# Two commands are enough on a fresh machine: `make train` and `make test`.
# Both make .venv first (only when pyproject.toml or constraints.txt changed since).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Overrides for the run, e.g. make train ARGS="training.total_steps=800"
ARGS   ?=
# Test processes; each of them computes on one thread.
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
GPU_JOBS ?= 8

.PHONY: train test test-slow test-gpu lint format clean

train: $(STAMP)
	$(BIN)/python train.py $(ARGS)
	run=$$($(BIN)/python train.py $(ARGS) --cfg job --resolve --package run_dir) && \
	$(BIN)/mamba-train generate "$$run" --prompt "def " --temperature 0.6 --save && \
	$(BIN)/mamba-train report "$$run"

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m slow

# On a machine with a GPU; first in several processes, then what needs most of its memory.
test-gpu: $(STAMP)
	code=0; \
	$(BIN)/python -m pytest -n $(GPU_JOBS) tests/gpu -m "not large_memory" || code=1; \
	$(BIN)/python -m pytest tests/gpu -m large_memory || code=1; \
	exit $$code

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] < (3, 15) else f"mamba-train needs Python 3.11 to 3.14, {sys.executable} is {v[0]}.{v[1]}: use make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .cache runs
