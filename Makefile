VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-levels bench-models profiles gpu-bench wheel sanitize clean

demo: $(VENV)/.installed  ## learn gates on a real model, remove 40 %, save, reload, time
	$(BIN)/finegates finetune

test: $(VENV)/.installed  ## the whole suite
	$(BIN)/python -m pytest

lint: $(VENV)/.installed  ## formats, lints, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h
	$(BIN)/mypy

LAYERS := build/layers
bench: $(VENV)/.installed  ## CPU kernels against every baseline: the whole grid, 1 thread and all
	mkdir -p $(LAYERS)
	for threads in 1 all; do \
	  case $$threads in 1) to=$(LAYERS)/one-thread;; all) to=$(LAYERS)/all-threads;; esac; \
	  $(BIN)/python -m pytest bench --benchmark-only -q --threads $$threads \
	    --benchmark-json=$$to.json || exit 1; \
	  $(BIN)/python bench/table.py $$to.json --png $$to.png > $$to.md || exit 1; done

LEVELS := generic avx2 avx512
# oneDNN, MKL and PyTorch are held to the same level; OpenVINO and ONNX Runtime can't be.
bench-levels: $(VENV)/.installed  ## a part of the grid at the instruction sets below the CPU's own
	mkdir -p $(LAYERS)
	for level in $(LEVELS); do \
	  case $$level in generic) caps='SSE41 SSE4_2 default';; avx2) caps='AVX2 AVX2 avx2';; \
	    avx512) caps='AVX512_CORE AVX512 avx512';; esac; set -- $$caps; \
	  FINEGATES_MAX_ISA=$$level ONEDNN_MAX_CPU_ISA=$$1 MKL_ENABLE_INSTRUCTIONS=$$2 \
	    ATEN_CPU_CAPABILITY=$$3 $(BIN)/python -m pytest bench --benchmark-only -q --quick \
	    -k bench_grid --benchmark-json=$(LAYERS)/$$level.json || exit 1; \
	  $(BIN)/python bench/table.py $(LAYERS)/$$level.json > $(LAYERS)/$$level.md || exit 1; done

SHAPES := minilm roberta-base roberta-large smollm2 llama-1b
MODELS := build/models
bench-models: $(VENV)/.installed  ## whole models, 40, 20 and 0 % removed, against other runtimes
	mkdir -p $(MODELS)
	for shape in $(SHAPES); do for sparsity in 0.4 0.2 0; do \
	  case $$sparsity in 0.4) how=;; *) how='--seconds 1 --no-memory';; esac; \
	  to=$(MODELS)/$$shape-$$sparsity; \
	  $(BIN)/finegates bench-model --shape $$shape --sparsity $$sparsity --bars $$how \
	    --json $$to.json --markdown $$to.md --png $$to.png || exit 1; done; done
	$(BIN)/python bench/models.py $(foreach s,$(SHAPES),$(foreach r,0.4 0.2 0,$(MODELS)/$s-$r.json)) \
	  --png $(MODELS)/all.png > $(MODELS)/all.md

PROFILES := build/profiles
PROFILE_ENCODER := --sequence 128
PROFILE_DECODER := --dtype bf16 --work decode --sequence 128
profiles: $(VENV)/.installed  ## where the time of whole models goes: encoders prefill, Llamas decode
	mkdir -p $(PROFILES)
	for shape in $(SHAPES); do \
	  case $$shape in smollm2|llama-1b) how='$(PROFILE_DECODER)';; *) how='$(PROFILE_ENCODER)';; esac; \
	  $(BIN)/finegates profile --shape $$shape --optimize $$how --json $(PROFILES)/$$shape.json \
	    --markdown $(PROFILES)/$$shape.md --png $(PROFILES)/$$shape.png || exit 1; done

# With the caller's Python: the pins above are CPU builds of torch. docs/kernels.md says what it
# needs. Everything runs, whatever failed before; what failed is named last.
gpu-bench:  ## the GPU's tests and tables, all in bench/results/gpu/CARD
	failed=; \
	for job in "bench/gpu_tests.py tests/test_triton_gpu.py --need-sanitizer" \
	  "bench/gpu_tests.py -m gpu tests/test_finetune.py" \
	  bench/bench_gated_linear.py bench/gpu_pruned_linear.py; do \
	  PYTHONPATH=.:tests $(PYTHON) $$job || failed="$$failed [$$job]"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

wheel: $(VENV)/.installed  ## sdist and wheel in dist/, tested in an empty environment
	PYTHON=$(abspath $(BIN))/python .ci/wheel.sh

sanitize: $(VENV)/.installed  ## address, undefined-behaviour and thread sanitizers over the kernels
	PYTHON=$(abspath $(BIN))/python .ci/sanitize.sh

clean:
	rm -rf $(VENV) build dist *.egg-info finegates/*.so

# constraints.txt pins what is installed; this install builds the extension.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
