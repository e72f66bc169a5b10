# A virtual environment in .venv is the only thing these targets install; `make clean` removes it.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(if $(shell $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo ok),$(p))))
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve test check format verify vectors bench clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(VENV)/types/triton_embed
	ln -sfn ../../../kernels ../../../python_backend ../../../gateway $(VENV)/types/triton_embed/

$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[test]'
	@touch $@ $(VENV)/.serve

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[bench]'
	@touch $@ $(VENV)/.serve

install: $(VENV)/.serve  ## Create .venv with everything the server needs

serve: $(VENV)/.serve  ## Serve embeddings on http://127.0.0.1:30000 (ARGS='--port 8080' and so on)
	@$(BIN)/triton-embed serve $(ARGS)

test: $(VENV)/.test  ## Run the tests (ARGS='-k gateway' and so on)
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.test  ## Lint, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

verify: $(VENV)/.test  ## Prove a model with the weights you have (MODEL=directory, id or name)
	@$(BIN)/triton-embed verify $(MODEL) $(ARGS)

vectors: $(VENV)/.test  ## Compare every family with transformers through the real server, and print the figures
	$(BIN)/python -m pytest tests/test_vectors.py $(ARGS)

bench: $(VENV)/.bench  ## Measure against sentence-transformers on this machine (ARGS='--quick')
	$(BIN)/python -m benchmarks.cpu $(ARGS)

clean:  ## Remove .venv and every cache
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
