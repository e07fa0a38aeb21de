PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check

install: .venv/installed

# torch first: a bare `torch` requirement would bring the CUDA packages to machines without a GPU.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## Train small models, draw both charts into runs/demo (about ten minutes on two cores)
	$(BIN)/openmoba study recipes/demo.toml --out runs/demo

check: install  ## Format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check  ## The gate: checks, then tests with warnings as errors, a worker for each core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile
