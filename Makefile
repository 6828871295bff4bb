# Two commands matter: `make demo` (the whole recipe on a tiny model) and `make test` (lint and the whole suite).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

.PHONY: demo test test-aot lint format clean

demo: $(VENV)/.installed
	$(BIN)/python launch/run.py quickstart $(ARGS)

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest tests --ignore tests/aot --numprocesses 2 --dist loadfile

# Compiles every stage for the TPU pod that its model names. It needs no TPU, but libtpu (0.7 GB) and 3 GB of memory.
test-aot: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,tpu]'
	$(BIN)/python -m pytest tests/aot -s

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch, and peft over it, serve only the check of the export against transformers, so only the CPU build will do:
# the local version "+cpu" never resolves to the CUDA build of several gigabytes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0+cpu' peft 2>/dev/null \
	  || echo 'No CPU build of torch to be had: the comparison with transformers is skipped. To add one: $(BIN)/pip install torch peft'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
