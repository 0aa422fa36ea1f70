# Everything from a bare machine with Python 3.11 or newer: each target makes .venv if need be.
#
#     make train                        a GPT that writes like Tolstoy; ARGS="..." for its options
#     make test                         the tests; ARGS="..." for pytest's
#     make test-tritons                 what compiles for a T4, under each Triton that we support
#     make lint                         style and types
#     make bench                        every op by every provider; ARGS="--no-sweeps" for no sweeps
#     make bench-train                  ms a training step, tokens/s, writing, seconds to a loss;
#                                       ARGS="--preset iron" on a CPU, which takes nano else
#     make bench-nano NANOGPT=folder    nano against nanoGPT's CPU recipe; folder: its checkout
#     make gpu                          all that a GPU is asked for, in ten minutes; sets nothing up
#     make report                       the page of the newest result

PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints.txt
PIP := $(BIN)/python -m pip install $(PIP_FLAGS)

TRITONS := 3.6.0 3.7.1 3.9.0

.PHONY: train test test-tritons lint bench bench-train bench-nano gpu report clean

train: .venv/run
	$(BIN)/irongpt train $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

test-tritons: $(TRITONS:%=test-triton-%)

test-triton-%: .venv-triton-%/ready
	.venv-triton-$*/bin/python -m pytest -p no:cacheprovider tests/aot/test_turing.py \
		tests/aot/test_compile.py $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

# ARGS are for all three (--preset, --device, --out, --result, --commit). One that fails does not
# keep the others from running.
bench-train: .venv/dev
	@failed=0; \
	run() { (set -x; "$$@" $(ARGS)) || failed=1; }; \
	run $(BIN)/python -m benchmarks.training $(if $(NANOGPT),--nanogpt "$(NANOGPT)"); \
	run $(BIN)/python -m benchmarks.decode; \
	run $(BIN)/python -m benchmarks.train_runs --section target; \
	exit $$failed

bench-nano: .venv/dev
	$(BIN)/python -m benchmarks.vs_nanogpt --nanogpt "$(NANOGPT)" $(ARGS)

# With the packages of .venv if it is there, else with those of PYTHON.
gpu:
	PYTHONPATH=.:kernels $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -m benchmarks.suite $(ARGS)

report: .venv/run
	$(BIN)/python -m benchmarks.report $(ARGS)

.venv/run: pyproject.toml constraints.txt
	@echo "setting up .venv with torch and what else a run needs: minutes the first time"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(PIP) --editable .
	@touch $@

.venv/dev: .venv/run
	@echo "setting up .venv for the tests"
	@$(PIP) --editable '.[dev]'
	@touch $@

.PRECIOUS: .venv-triton-%/ready
# A torch for CUDA brings its own Triton, which this one replaces: nothing runs on a GPU here.
.venv-triton-%/ready: pyproject.toml constraints.txt
	@echo "setting up .venv-triton-$*"
	@$(PYTHON) -m venv --clear .venv-triton-$*
	@.venv-triton-$*/bin/python -m pip install $(PIP_FLAGS) --editable . pytest
	@.venv-triton-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==$*
	@touch $@

clean:
	rm -rf .venv .venv-triton-*
