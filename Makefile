# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs (a virtual environment in .venv) first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  ?= examples/tiny-llama
PROMPT ?= def fibonacci(n):
SEED   ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-run demo test test-full lint bench-dispatch bench-cpu bench-overlap bench-collectives prove-links schema table build wheel wheel-prebuilt clean

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

test-full: $(VENV)/.dev    ## full grids and long fuzzing
	HETERO_ATTN_FULL=1 $(BIN)/python -m pytest -q tests hetero_attn/testing --timeout=3000

lint: $(VENV)/.dev         ## ruff
	$(BIN)/ruff check .

bench-dispatch: $(VENV)/.dev   ## what a call costs beyond the kernel (bound: 10 us)
	$(BIN)/python benchmarks/dispatch.py

bench-cpu: $(VENV)/.bench      ## the cpu backend beside its peers and the machine's limits (8 minutes; BENCH="--quick --only linear")
	$(BIN)/python benchmarks/cpu_attention.py $(BENCH)

bench-collectives: $(VENV)/.bench  ## collectives beside gloo, OpenMPI and the cost model (6 minutes, accuracy 30 more; BENCH="--without accuracy")
	$(BIN)/python benchmarks/collectives.py $(BENCH)
bench-overlap: $(VENV)/.bench  ## schedules beside one another on limited links (root only, long; BENCH="--tokens 512 --links '300 Mbit/s'")
	$(BIN)/python benchmarks/overlap.py --mixed --tiled 512 2048 --trace --write $(BENCH)

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
	rm -rf $(VENV) dist .pytest_cache .hypothesis .ruff_cache
