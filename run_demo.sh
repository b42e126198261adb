#!/usr/bin/env bash
# Sets up .venv, then trains a small DiT on handwritten digits, samples from it and prints the speed table.
# Run it from anywhere and as often as you like; arguments go to examples/image/train.py (try --help).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source tools/venv.sh examples

exec python examples/image/train.py "$@"
