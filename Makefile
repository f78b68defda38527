# Two commands: `make demo` and `make test`. Each makes the environment .venv on first use, from the versions pinned in
# constraints.txt, and is quick the second time. Nothing outside this folder is touched.

PYTHON ?= python3
PYTEST_ARGS ?=
OUT ?= gpu-output
MINUTES ?= 9
SET ?= main
SEED ?= 0
SAMPLE ?= 0

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS := constraints.txt pyproject.toml setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-all exhaustive mutants compatibility lint types bench static gpu gpu-rehearsal clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/demo.stamp  ## train on real digits, classify, show what the model looked at (demo-output/)
	$(BIN)/python -m vit_fast.demo

test: $(VENV)/test.stamp  ## every test but the slow ones; PYTEST_ARGS="tests/ops -k mlp" chooses
	$(BIN)/python -m tests $(PYTEST_ARGS)

test-all: $(VENV)/test.stamp  ## the slow tests too
	$(BIN)/python -m tests --slow $(PYTEST_ARGS)

# Each keeps its counts in tests/results; the page shows them.
exhaustive: $(VENV)/test.stamp  ## the tests and the long runs: guard pages, kills, hostile files; two hours; SEED=1 for others
	$(BIN)/python -m tests --keep
	$(BIN)/python -m tests.exhaustive --seed $(SEED)
	$(BIN)/python -m tests.faults --kills 200 --seed $(SEED)
	$(BIN)/python -m tests.hostile --files 2000 --seed $(SEED)
	$(BIN)/python -m tests.numbers --draws 4 --seed $(SEED)
	$(BIN)/python -m tests.leaks
	$(BIN)/python -m tests.readme

mutants: $(VENV)/test.stamp  ## 230 bugs put into kernels and ops, each against its tests: an hour; SAMPLE=10 SEED=1 draws some
	$(BIN)/python -m tests.mutants --sample $(SAMPLE) --seed $(SEED)

# Outside .venv: an environment a Python, some 5 GB each, under build/.
compatibility: $(VENV)/test.stamp  ## each Python that is found by Triton 3.6, 3.7, 3.9 and none, and the lowest requirements
	$(BIN)/python -m tests.compatibility
	$(BIN)/python -m tests.compatibility --lowest --triton 3.6.0

lint: $(VENV)/lint.stamp  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp  ## mypy: the package, and a program of a user's on its public names
	$(BIN)/mypy

bench: $(VENV)/test.stamp  ## time on this machine's CPU against timm, transformers and torchvision
	$(BIN)/python -m benchmarks.cpu

static: $(VENV)/test.stamp  ## what the compilers of ten GPUs make of every kernel: half an hour on two cores the first time
	$(BIN)/python -m benchmarks.static --arch all --dtype all --check

# With the python3 that is there, its torch and its triton: the environment above has a CPU's. Nothing is installed.
gpu:  ## check, measure and tune the GPU that is here, in MINUTES=9, to OUT=gpu-output; SET=full for every shape
	$(PYTHON) -m benchmarks.gpu $(OUT) --minutes $(MINUTES) --set $(SET)

gpu-rehearsal: $(VENV)/test.stamp  ## the same on this CPU at tiny shapes: that it runs, no figure counts
	$(BIN)/python -m benchmarks.gpu $(OUT) --minutes $(MINUTES) --batch-size 2 --workers 2

clean:  ## remove the environment and everything that was made
	rm -rf $(VENV) build dist demo-output gpu-output *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/made.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or later is needed for what is pinned (the package takes 3.10), $(PYTHON) is " + sys.version)'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) setuptools
	@touch $@

# The project's own requirements bring torch and, by name, triton: the CPU build of torch has none. All in one
# constrained install, so that no open range pulls another torch.
$(VENV)/demo.stamp: $(PINS) $(VENV)/made.stamp
	@echo "installing vit_fast and what the demo needs into $(VENV): PyTorch is large, this can take some minutes"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[cli]'
	@touch $@

# After the demo's: timm brings torchvision, which must find torch installed.
$(VENV)/test.stamp: $(PINS) $(VENV)/demo.stamp
	@echo "installing what the tests and benchmarks need into $(VENV)"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[cli,dev,bench]'
	@touch $@

$(VENV)/lint.stamp: constraints.txt $(VENV)/made.stamp
	@$(PIP_INSTALL) ruff
	@touch $@
