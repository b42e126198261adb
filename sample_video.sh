#!/usr/bin/env bash
# Draws clips:  ./sample_video.sh --checkpoint outputs/clips-flow --classes 0 1 --out clips.gif
# On several GPUs: NPROC=8 ./sample_video.sh … ; on several nodes see examples/README.md. --help lists the settings.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/tools/venv.sh" examples
if [ "${NPROC:-1}" != 1 ]; then
    exec torchrun --standalone --nproc_per_node="$NPROC" "$here/examples/video/sample.py" "$@"
fi
exec python "$here/examples/video/sample.py" "$@"
