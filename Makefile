# delib_fast: `make quickstart` trains the example, `make test` runs the tests. Both set everything up in .venv first.
# A torch that is already installed for PYTHON (on a GPU machine, say) is used and never replaced.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two ranks share a small machine badly; leave the cores to one.
RANKS  ?= 1
# Processes that share the tests.
WORKERS ?= 2

.PHONY: help setup quickstart test test-fast lint bench bench-quick cuda clean

help:           ## what there is to make
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## a virtual environment in .venv with everything installed

$(READY): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" bash tools/setup.sh
	@touch $@

quickstart: setup ## train a small model on the example data: MSM, then AFT with CoT
	$(BIN)/deepspeed --num_accelerators $(RANKS) delib_fast/train.py --config examples/quickstart.yaml

test: setup     ## all tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-fast: setup ## the tests a laptop runs between two edits
	$(BIN)/python -m pytest -q -m "not slow"

lint: setup     ## ruff format, ruff check, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup    ## every benchmark that runs on this machine
	$(BIN)/python -m pytest bench -q --benchmark-json bench/results/last.json

bench-quick: setup ## small cases, and whether their shares of the roof hold: what CI runs
	$(BIN)/python bench/guard.py

cuda:           ## compile every .cu for sm_80 and sm_90a (no GPU needed)
	bash tools/compile_cuda.sh

clean:          ## remove what the build made (not .venv, not runs/)
	rm -rf build *.egg-info delib_fast/*.so
