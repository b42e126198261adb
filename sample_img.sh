#!/usr/bin/env bash
# Draws images:  ./sample_img.sh                                                 by a model that comes with the project
#                ./sample_img.sh --checkpoint outputs/digits-flow --classes 4 2   by yours
# On several GPUs: NPROC=8 ./sample_img.sh … ; on several nodes see examples/README.md. --help lists the settings.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
source "$here/tools/venv.sh" examples
if [ "${NPROC:-1}" != 1 ]; then
    exec torchrun --standalone --nproc_per_node="$NPROC" "$here/examples/image/sample.py" "$@"
fi
exec python "$here/examples/image/sample.py" "$@"
