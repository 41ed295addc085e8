# `make quickstart` trains a model on the example data, `make test` runs the tests. Both first set everything up in .venv.
# A torch that PYTHON already has (on a GPU machine, for example) is used and never replaced.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two ranks on a small machine compete for its cores, so the default is one.
RANKS  ?= 1
# Number of test processes.
WORKERS ?= 2

.PHONY: help setup quickstart quickstart-tiny test test-fast lint bench bench-quick cuda clean

help:           ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## create .venv with everything installed

$(READY): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" bash tools/setup.sh
	@touch $@

quickstart: setup ## train SmolLM2-135M on the example data: MSM, then AFT with CoT; show its replies before and after
	@BIN="$(BIN)" RANKS="$(RANKS)" bash tools/quickstart.sh

quickstart-tiny: setup ## the same with a new model of about a million parameters, without a download
	$(BIN)/deepspeed --num_accelerators $(RANKS) delib_fast/train.py --config examples/quickstart_tiny.yaml

test: setup     ## run all tests
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations 20

test-fast: setup ## run the tests that are not marked slow
	$(BIN)/python -m pytest -q -m "not slow"

lint: setup     ## run ruff format, ruff check and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup    ## run every benchmark that this machine supports
	$(BIN)/python -m pytest bench -q --benchmark-json bench/results/last.json

bench-quick: setup ## run small benchmarks and compare them with stored results, as CI does
	$(BIN)/python bench/regression_gate.py

cuda:           ## compile every .cu file for sm_80 and sm_90a (needs no GPU)
	bash tools/compile_cuda.sh

clean:          ## remove build outputs (keeps .venv and runs/)
	rm -rf build *.egg-info delib_fast/*.so
