#!/usr/bin/env bash
# Scores generated images or clips:  ./eval.sh image|video --generated … --real … --features … --image_size …
# On several GPUs: NPROC=8 ./eval.sh … ; --help after image or video lists the settings.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
case "${1:-}" in
    image | video) kind=$1; shift ;;
    *) echo "eval.sh: error: the first argument is image or video, not '${1:-}'" >&2; exit 2 ;;
esac
source "$here/tools/venv.sh" examples
if [ "${NPROC:-1}" != 1 ]; then
    exec torchrun --standalone --nproc_per_node="$NPROC" "$here/examples/$kind/evaluate.py" "$@"
fi
exec python "$here/examples/$kind/evaluate.py" "$@"
