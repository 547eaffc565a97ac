# Every target sets up what it needs in $(VENV) first, once, and again when pyproject.toml changes.
PYTHON ?= python3
VENV   ?= .venv
# One test module at a time in each worker; PYTEST_ARGS="-n 0" runs them in one process.
PYTEST_ARGS ?= -n logical --maxprocesses 8 --dist loadfile

BIN    := $(VENV)/bin
# The workers share the cores already: threads of OpenBLAS only wait for each other.
PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest
# Docs, examples and tests run much of the same code: what one has compiled the others read. Small
# programs too: to read one takes less than half as long as to compile it, to write one hardly any.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
SMALL  := MPLBACKEND=Agg TOLERAX_EXAMPLE_SIZE=small

.DEFAULT_GOAL := help
.PHONY: help demo test setup examples guide lint format types docs bench build clean

help:            ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

demo: $(VENV)/with-examples        ## learn a TV denoiser from pictures, save before/after to demo.png
	$(BIN)/python examples/plot_tv_denoising.py --save demo.png

test: $(VENV)/with-dev             ## run the tests and the examples in the docstrings
	$(PYTEST) -m "not example" $(PYTEST_ARGS)

setup: $(VENV)/with-dev            ## only set up the environment, with everything for development

examples: $(VENV)/with-dev         ## run every script of examples/ at small size, and the guide
	$(PYTEST) -m example tests/test_examples.py tests/test_guide.py $(PYTEST_ARGS) \
	  --dist worksteal

guide: $(VENV)/with-dev            ## run the Python of the guide's pages: it prints what they show
	@# Behind the docs where both are made: at their end these have work for one core only.
	nice env $(PYTEST) -m example tests/test_guide.py $(PYTEST_ARGS) --dist worksteal

lint: $(VENV)/with-dev             ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/with-dev           ## ruff: mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/with-dev            ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/with-dev             ## build docs/_build/html; TOLERAX_EXAMPLE_SIZE=small for a fast one
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env -b html docs docs/_build/html

bench: $(VENV)/with-dev            ## print the figures of the benchmark page
	$(BIN)/python -m benchmarks bilevel

build: $(VENV)/with-dev            ## source distribution and wheel, into dist/
	$(BIN)/python -m build --outdir dist

clean:           ## remove what the targets above made, and the environment
	rm -rf $(VENV) .jax_cache dist docs/_build docs/gallery docs/reference/generated demo.png

# The environment. A stamp says that an extra of pyproject.toml is installed.
$(VENV)/with-%: pyproject.toml $(VENV)/made
	@echo "Installing tolerax[$*] into $(VENV)"
	@# Python compiles what is imported; to have pip compile all that is installed takes longer.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),$(VENV)/with-examples)

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Tolerax needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@
