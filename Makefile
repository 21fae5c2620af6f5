# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs (a virtual environment in .venv) first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= examples/tiny-llama
PROMPT ?= def fibonacci(n):
SEED   ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-run demo test test-full lint bench-dispatch bench-cpu bench-collectives bench-volta-layout prove-links schema table build wheel wheel-prebuilt clean test-ascend npu-check bench-ascend-model bench-edge bench-overlap bench-cooperation gpu-check

help:              ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

# torch first, alone and pinned: a looser requirement would pull several gigabytes of CUDA libraries onto a CPU machine.
$(VENV)/.torch: constraints.txt
	@echo "setting up $(VENV) (torch first: a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.run
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

setup-run: $(VENV)/.run    ## a virtual environment that runs the project
setup: $(VENV)/.dev        ## the same with everything the tests need

demo: $(VENV)/.run         ## stream a completion of a Python prompt by examples/tiny-llama on two ranks
	$(BIN)/hetero-attn generate $(MODEL) --profile cpu --tp 2 --max-new-tokens 200 --temperature 0.7 --seed $(SEED) --echo --prompt '$(PROMPT)'

test: $(VENV)/.dev         ## the quick whole: reduced grids, real ranks
	$(BIN)/python -m pytest -q tests hetero_attn/testing
	$(MAKE) --no-print-directory test-ascend

test-full: $(VENV)/.dev    ## full grids and long fuzzing
	HETERO_ATTN_FULL=1 $(BIN)/python -m pytest -q tests hetero_attn/testing --timeout=3000
	HETERO_ATTN_FULL=1 $(MAKE) --no-print-directory test-ascend

# torch_npu breaks `import torch` without CANN, and triton-ascend is the package `triton`: an environment each, made once in .venv-ascend,
# which sees $(VENV) behind its own packages. Where a wheel cannot be had (exit code 3) its tests are skipped, and it says so.
test-ascend: $(VENV)/.dev  ## the ascend backend against the real torch-npu and triton-ascend wheels, without an NPU
	@if npu=$$($(BIN)/python tests/ascend_environment.py torch-npu); then \
	    TORCH_DEVICE_BACKEND_AUTOLOAD=0 $$npu -m pytest -q -p no:cacheprovider --timeout=3000 tests/test_ascend_contract.py tests/test_ascend_hccl.py || [ $$? -eq 5 ]; \
	elif [ $$? -eq 3 ]; then echo "test-ascend: torch_npu's part skipped, see above"; else exit 1; fi
	@if triton=$$($(BIN)/python tests/ascend_environment.py triton-ascend); then \
	    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=1 $$triton -m pytest -q -p no:cacheprovider --timeout=3000 tests/test_ascend_kernel.py && \
	    $$triton -m pytest -q -p no:cacheprovider --timeout=3000 tests/test_ascend_lowering.py; \
	elif [ $$? -eq 3 ]; then echo "test-ascend: triton-ascend's part skipped, see above"; else exit 1; fi

gpu-check:                 ## on a GPU: run the suites and benchmarks, write docs/measured/<device>.md (says what it needs elsewhere; CHECK="--quick --only norm")
	PYTHONPATH=.:backends $(PYTHON) -m hetero_attn.testing.gpu $(CHECK)

npu-check:                 ## on an Ascend NPU: run the suites and write the page to send back (says what it needs elsewhere)
	$(PYTHON) benchmarks/npu_check.py $(CHECK)

lint: $(VENV)/.dev         ## ruff
	$(BIN)/ruff check .

bench-dispatch: $(VENV)/.dev   ## what a call costs beyond the kernel (bound: 10 us)
	$(BIN)/python benchmarks/dispatch.py

bench-cpu: $(VENV)/.bench      ## the cpu backend beside its peers and the machine's limits (8 minutes; BENCH="--quick --only linear")
	$(BIN)/python benchmarks/cpu_attention.py $(BENCH)

bench-collectives: $(VENV)/.bench  ## collectives beside gloo, OpenMPI and the cost model (6 minutes, accuracy 30 more; BENCH="--without accuracy")
	$(BIN)/python benchmarks/collectives.py $(BENCH)

bench-overlap: $(VENV)/.bench  ## schedules beside one another on limited links (root only, half an hour; BENCH="--keep FILE" goes on where it stopped)
	$(BIN)/python benchmarks/overlap.py --grid --trace --write $(BENCH)

bench-volta-layout: $(VENV)/.dev   ## bank conflicts of the Volta kernels by shared-memory layout, counted on the CPU (a minute)
	$(BIN)/python benchmarks/volta_layout.py $(BENCH)

bench-ascend-model: $(VENV)/.bench   ## two levels of tiling against one on Ascend chips, by the executable model (a model, no NPU; 2 minutes)
	$(BIN)/python benchmarks/ascend_model.py $(BENCH)

bench-edge: $(VENV)/.bench     ## models larger than memory: 7B and 70B shapes, windows, Accelerate (30 GB of disk; BENCH="--quick --only main")
	$(BIN)/python benchmarks/edge.py $(BENCH)

bench-cooperation: $(VENV)/.bench  ## KV of half the layers in host memory, on host tensors with an enforced budget (2 minutes; BENCH="--context 16384 --ways all-device half")
	$(BIN)/python benchmarks/cooperation.py --write $(BENCH)

prove-links:               ## emulated 300 Mbit/s, 1 ms links between 4 ranks (root only): what they measure to be
	$(PYTHON) benchmarks/links.py --ranks 4 --rate 300 --delay 1 --prove

schema: $(VENV)/.run       ## rewrite configs/profile.schema.json from the dataclasses
	$(BIN)/python -m hetero_attn.profile_schema --write

table: $(VENV)/.run        ## rewrite README.md's table of backends and features from the code
	$(BIN)/python -m hetero_attn.testing.feature_table --write README.md

build: $(VENV)/.run        ## compile the native kernels this machine will use (otherwise: on first use)
	$(BIN)/hetero-attn build

wheel: $(VENV)/.dev        ## build a wheel into dist/
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

wheel-prebuilt: $(VENV)/.dev   ## the same with the native kernels compiled into it, for machines without a compiler
	HETERO_ATTN_PREBUILD=1 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

clean:             ## remove the virtual environment and what was built
	rm -rf $(VENV) .venv-ascend dist .pytest_cache .hypothesis .ruff_cache
