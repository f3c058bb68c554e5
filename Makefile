# `make demo` and `make test` need nothing but Python 3.10 or newer; both make `.venv` once.
# On a machine without a GPU the CPU build of torch is much smaller:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/installed
# OpenMP threads that wait sleep after about a tenth of a millisecond: spinning on costs tenfold beside another process,
# sleeping at once took a third of the speed of two threads here.
export GOMP_SPINCOUNT = 20000

.PHONY: demo test test-all lint clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; set PYTHON')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(RUN) lightning_distill fit --config shapes_meanflow.yaml

lint: $(STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(VENV)/bin/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist worksteal

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
