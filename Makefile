# make demo · make test · make bench · make check: each installs what it needs first; the second call starts at once.
PYTHON ?= python3
PIP_OPTIONS ?=
BIN := .venv/bin
READY := .venv/.ready
READY_IMAGES := .venv/.ready-images
READY_DEV := .venv/.ready-dev
READY_DOCS := .venv/.ready-docs
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal
# So that the hundreds of programs that tests start do not compile the package again and again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-dev demo demo-images test coverage bench kernels-aot docs check format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## create .venv and install what the pipeline and the server need

setup-dev: $(READY_DEV) ## also install every extra and what the tests and checks need

$(READY): setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  echo "cannot create .venv: on Debian and Ubuntu, install python3-venv first" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed: rm -r .venv; make setup PYTHON=python3.11" >&2; exit 1; }
	@echo "installing into .venv (only once; takes a few minutes)"
	@$(INSTALL) '.[fast,serve]'
	@touch $@

$(READY_IMAGES): $(READY)
	@$(INSTALL) '.[tasks]'
	@touch $@

$(READY_DEV): $(READY)
	@echo "installing the packages of tests and checks into .venv (only once; takes a few minutes)"
	@$(INSTALL) '.[dev]'
	@touch $@

$(READY_DOCS): $(READY)
	@$(INSTALL) '.[docs]'
	@touch $@

demo: setup ## the whole pipeline: text, tokenizer, shards, training, evaluation, samples, report
	@$(BIN)/kindling demo

demo-images: $(READY_IMAGES) ## the same on images: scikit-learn's digits, features learned without labels, then judged
	@$(BIN)/kindling demo --images

test: setup-dev ## run all tests on all cores
	$(PYTEST) $(COVERAGE)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton $(COVERAGE) $(if $(COVERAGE),--cov-append)

coverage: ## the same, counting which lines ran, in half as much time again
	@$(MAKE) test COVERAGE="--cov --cov-report="
	$(BIN)/python -m coverage report --fail-under=85

bench: setup-dev ## compare with other programs, on the CPU (python -m benchmarks.gpu on a GPU)
	$(BIN)/python -m benchmarks.cpu_attention
	$(BIN)/python -m benchmarks.cpu_cross_entropy
	$(BIN)/python -m benchmarks.generate

kernels-aot: setup-dev ## compile every kernel for several GPU architectures, without a GPU; UPDATE=--update accepts changes
	$(BIN)/python -m lm.kernels.aot $(UPDATE)

docs: $(READY_DOCS) ## build the documentation site in build/docs/html; a warning or a dead link fails
	$(BIN)/python docs/site/build.py build/docs

check: setup-dev ## check style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup-dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment and everything that was built, data and runs included
	rm -rf .venv data runs sweeps build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
