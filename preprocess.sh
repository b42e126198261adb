#!/usr/bin/env bash
# Turns images or videos into latents and text embeddings:  ./preprocess.sh image|video --data_path … --out … --vae …
# On several GPUs: NPROC=8 ./preprocess.sh … ; --help after image or video lists the settings.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
case "${1:-}" in
    image | video) kind=$1; shift ;;
    *) echo "preprocess.sh: error: the first argument is image or video, not '${1:-}'" >&2; exit 2 ;;
esac
source "$here/tools/venv.sh" examples
if [ "${NPROC:-1}" != 1 ]; then
    exec torchrun --standalone --nproc_per_node="$NPROC" "$here/examples/$kind/preprocess.py" "$@"
fi
exec python "$here/examples/$kind/preprocess.py" "$@"
