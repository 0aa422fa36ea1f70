# Everything from a bare machine with Python 3.11 or newer: each target makes .venv if need be.
#
#     make train                        a GPT that writes like Tolstoy; ARGS="..." for its options
#     make test                         the tests; ARGS="..." for pytest's
#     make lint                         style and types
#     make bench NANOGPT=folder         nano against nanoGPT's CPU recipe; folder: its checkout

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train test lint bench clean

train: .venv/run
	$(BIN)/irongpt train $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/python -m benchmarks.nano --nanogpt "$(NANOGPT)" $(ARGS)

.venv/run: pyproject.toml constraints.txt
	@echo "setting up .venv with torch and what else a run needs: minutes the first time"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@$(PIP) --editable .
	@touch $@

.venv/dev: .venv/run
	@echo "setting up .venv for the tests"
	@$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
