#!/usr/bin/env bash
# Trains on images; without settings, on handwritten digits:  ./train_img.sh --data_path FOLDER --model DiT-B/4 …
# On several GPUs: NPROC=8 ./train_img.sh … ; on several nodes see examples/README.md. --help lists the settings.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/tools/venv.sh" examples
if [ "${NPROC:-1}" != 1 ]; then
    exec torchrun --standalone --nproc_per_node="$NPROC" "$here/examples/image/train.py" "$@"
fi
exec python "$here/examples/image/train.py" "$@"
