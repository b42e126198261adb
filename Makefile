# Shortcuts. Each target sets up .venv first where that is needed.
.PHONY: demo test test-all test-gpu check format bench

demo:
	./run_demo.sh

test:
	./run_tests.sh

test-all:
	./run_tests.sh -m ""

test-gpu:
	./run_tests.sh -m gpu

check:
	bash -c 'source tools/venv.sh dev && ruff format --check . && ruff check . && mypy'

format:
	bash -c 'source tools/venv.sh dev && ruff format . && ruff check --fix .'

bench:
	bash -c 'source tools/venv.sh dev && python benchmarks/all.py'
