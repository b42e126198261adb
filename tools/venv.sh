# Makes .venv in the repository, or brings it up to date, and puts its programs first on PATH.
#   source tools/venv.sh EXTRAS        e.g. source tools/venv.sh dev
# Without an NVIDIA GPU the CPU build of torch comes first, so that no CUDA packages are pulled in.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stamp="$root/.venv/.installed-$1-$(cksum <"$root/pyproject.toml" | tr ' ' '-')"

if [ ! -e "$stamp" ]; then
    echo "Setting up $root/.venv ($1) ..." >&2
    [ -x "$root/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$root/.venv"
    if ! command -v nvidia-smi >/dev/null 2>&1; then
        "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
    fi
    "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check -e "$root[$1]"
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
