# Each target sets up .venv first if it needs it. ARGS="..." passes options on.

PYTHON ?= python3
BIN := .venv/bin
PIP_FLAGS := --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install $(PIP_FLAGS) --constraint .venv/constraints.txt

ARCHS := sm_75 sm_80 sm_90
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
RUN ?= $(shell ls -td runs/*/ 2>/dev/null | head -n 1)

.DEFAULT_GOAL := help
.PHONY: help setup train generate compare doctor test test-tritons test-compiled mutants lint format check \
	bench bench-train bench-nano gpu report clean

help: ## print this list
	@echo 'usage: make TARGET [ARGS="options of the command"]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile

setup: .venv/dev ## create .venv with all dependencies, for development (Python 3.11 or newer)

train: .venv/run ## train on War and Peace; ARGS="--data my.txt" for another text
	$(BIN)/irongpt train $(ARGS)

generate: .venv/run ## generate text with the newest run, or RUN=folder; ARGS="--prompt Well"
	$(if $(RUN),,$(error there is no run in runs/ yet: `make train` makes one))
	$(BIN)/irongpt generate $(RUN) $(ARGS)

compare: .venv/run ## check the kernels against eager PyTorch (without a GPU: ARGS="--arch sm_75")
	$(BIN)/irongpt compare $(ARGS)

doctor: .venv/run ## print which device, dtype and kernels will be used, and why
	$(BIN)/irongpt doctor $(ARGS)

test: .venv/dev ## run the tests; ARGS="-k gelu" for some of them
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-tritons: $(TRITONS:%=test-triton-%) ## compile the kernels with every supported version of Triton

test-triton-%: .venv-triton-%/ready
	.venv-triton-$*/bin/python -m pytest -p no:cacheprovider tests/aot/test_turing.py \
		tests/aot/test_compile.py $(ARGS)

# If one step fails, the others still run. ARGS="--rows FILE" continues a run that was stopped.
test-compiled: .venv/dev $(TRITONS:%=.venv-triton-%/ready) ## execute the compiled kernels on the CPU (about three hours on one core)
	@failed=0; \
	run() { (set -x; "$$@") || failed=1; }; \
	run $(BIN)/python -m tests.ptx --arch $(ARCHS) --set table edges strides tuned $(ARGS); \
	run $(BIN)/python -m tests.ptx --arch $(ARCHS) --set sample --order ascending descending $(ARGS); \
	run $(BIN)/python -m tests.ptx --arch $(ARCHS) --set sample --mma hardware --noise 1 $(ARGS); \
	run $(BIN)/python -m tests.ptx.injected --arch $(ARCHS); \
	for arch in $(ARCHS); do \
		run $(BIN)/irongpt compare --arch $$arch; \
		run $(BIN)/python -m pytest -p tests.ptx.plugin --ptx $$arch tests/kernels; \
	done; \
	for triton in $(TRITONS); do \
		run .venv-triton-$$triton/bin/python -m tests.ptx --arch $(ARCHS) --set sample $(ARGS); \
	done; \
	exit $$failed

mutants: .venv/dev ## run the mutation tests (about an hour and a half); ARGS="--only gelu" for some of them
	$(BIN)/python -m tests.mutants.run $(ARGS)

lint: .venv/dev ## check style and types (ruff, mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev ## format the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## everything that CI runs: lint and test

bench: .venv/dev ## time every op in every implementation; ARGS="--no-sweeps" for one shape per op
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

# ARGS go to all three commands (--preset, --device, --out, --result, --commit). If one fails, the
# others still run.
bench-train: .venv/dev ## time training steps (NANOGPT=folder: nanoGPT's too), generation, training to a loss
	@failed=0; \
	run() { (set -x; "$$@" $(ARGS)) || failed=1; }; \
	run $(BIN)/python -m benchmarks.training $(if $(NANOGPT),--nanogpt "$(NANOGPT)"); \
	run $(BIN)/python -m benchmarks.decode; \
	run $(BIN)/python -m benchmarks.train_runs --section target; \
	exit $$failed

# ARGS go to both commands (--out, --result, --commit). On a CPU a step of 64 sequences takes half a
# minute.
bench-nano: .venv/dev ## time preset nano against nanoGPT's CPU recipe; NANOGPT=folder of nanoGPT
	$(BIN)/python -m benchmarks.vs_nanogpt --nanogpt "$(NANOGPT)" $(ARGS)
	$(BIN)/python -m benchmarks.training --preset iron --batch-size 4 --device cpu \
		--variants builtin nanoGPT --nanogpt "$(NANOGPT)" $(ARGS)

gpu: .venv/dev ## run the full GPU suite (at most 40 minutes)
	$(BIN)/python -m benchmarks.suite $(ARGS)

report: .venv/run ## write a report of the newest benchmark result; ARGS=file for another
	$(BIN)/python -m benchmarks.report $(ARGS)

.venv/run: pyproject.toml constraints.txt make_venv.py
	@echo "setting up .venv with torch and the other dependencies: takes minutes the first time"
	@$(PYTHON) make_venv.py
	@$(PIP) --editable .
	@touch $@

.venv/dev: .venv/run
	@echo "setting up .venv for the tests"
	@$(PIP) --editable '.[dev]'
	@touch $@

.PRECIOUS: .venv-triton-%/ready
# A torch for CUDA brings its own Triton, which is replaced here: these tests run nothing on a GPU.
.venv-triton-%/ready: pyproject.toml constraints.txt
	@echo "setting up .venv-triton-$*"
	@$(PYTHON) -m venv --clear .venv-triton-$*
	@.venv-triton-$*/bin/python -m pip install $(PIP_FLAGS) --constraint constraints.txt --editable . pytest
	@.venv-triton-$*/bin/python -m pip install $(PIP_FLAGS) --no-deps triton==$*
	@touch $@

clean: ## delete .venv, .venv-triton-* and build output (never runs or results)
	rm -rf .venv .venv-triton-* build *.egg-info
