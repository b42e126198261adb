#!/usr/bin/env bash
# Sets up .venv and runs the checks and the CPU test suite. Arguments go to pytest (default: all but slow and GPU tests).
set -euo pipefail
cd "$(dirname "$0")"
source tools/venv.sh dev

ruff format --check --quiet .
ruff check --quiet .
mypy --no-error-summary
if [ "$#" -eq 0 ]; then
    set -- -m "not slow and not gpu"
fi
exec python -m pytest -q "$@"
