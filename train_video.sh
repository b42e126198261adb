#!/usr/bin/env bash
# Trains on clips:  ./train_video.sh --data_path FOLDER --num_frames 16 --model Latte-S/2 …
# On several GPUs: NPROC=8 ./train_video.sh … ; on several nodes see examples/README.md. --help lists the settings.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/tools/venv.sh" examples
if [ "${NPROC:-1}" != 1 ]; then
    exec torchrun --standalone --nproc_per_node="$NPROC" "$here/examples/video/train.py" "$@"
fi
exec python "$here/examples/video/train.py" "$@"
