VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint bench gpu-bench clean

demo: $(VENV)/.installed  ## learn gates on a real model, remove 40 %, save, reload, time
	$(BIN)/finegates finetune

test: $(VENV)/.installed  ## the whole suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only

# With the caller's Python: the pins above are CPU builds of torch.
gpu-bench:  ## the GPU's tests, then its tables in bench/results/gpu
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests
	PYTHONPATH=. $(PYTHON) bench/bench_gated_linear.py
	PYTHONPATH=. $(PYTHON) bench/gpu_pruned_linear.py

clean:
	rm -rf $(VENV) build dist *.egg-info finegates/*.so

# The CPU build of torch is pinned by constraints.txt; the extension is built by this install.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
