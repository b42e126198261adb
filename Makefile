# Everything runs inside .venv; `make setup` makes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup check format test test-all test-gpu bench

setup:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[dev]'

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test:
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-all:
	$(BIN)/python -m pytest -q -m "not gpu"

test-gpu:
	$(BIN)/python -m pytest -q -m gpu

bench:
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/train_step.py
