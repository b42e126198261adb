#!/usr/bin/env bash
# Installs opendit with what its examples need into .venv, then trains a small DiT on handwritten digits.
# Run it from anywhere and as often as you like; its arguments go to examples/image/train.py (try --help).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

python=.venv/bin/python
if ! [ -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
  "${PYTHON:-python3}" -m venv .venv || {
    echo "run_demo.sh: could not make .venv (on Debian and Ubuntu: apt install python3-venv)" >&2
    exit 1
  }
fi

# Installed once; again when pyproject.toml has changed since.
stamp=.venv/.demo-installed
if ! [ -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing into .venv …"
  if ! { command -v nvidia-smi && nvidia-smi -L | grep -q GPU; } >/dev/null 2>&1; then
    # Without a GPU, the build without CUDA; where its index is out of reach, what pip finds for this version.
    "$python" -c 'import torch' 2>/dev/null ||
      "$python" -m pip install -q --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 2>/dev/null ||
      "$python" -m pip install -q torch==2.13.0
  fi
  "$python" -m pip install -q -e '.[examples]'
  touch "$stamp"
fi

exec "$python" examples/image/train.py "$@"
