# Makes .venv in the repository, or brings it up to date, and puts its programs first on PATH.
#   source tools/venv.sh EXTRAS        e.g. source tools/venv.sh dev
# Without an NVIDIA GPU torch 2.13.0 comes first, so that no CUDA packages are pulled in where its CPU build is at hand.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stamp="$root/.venv/.installed-$1-$(cat "$root/pyproject.toml" "$root/requirements-colossalai.txt" | cksum | tr ' ' '-')"

if [ ! -e "$stamp" ]; then
    echo "Setting up $root/.venv ($1) ..." >&2
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        "${PYTHON:-python3}" -m venv "$root/.venv" || {
            echo "tools/venv.sh: could not make .venv (on Debian and Ubuntu: apt install python3-venv)" >&2
            exit 1
        }
    fi
    if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
        "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
    fi
    "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check -e "$root[$1]"
    if [ "$1" = dev ]; then
        # Apart, for its metadata asks for an old torch.
        "$root/.venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r "$root/requirements-colossalai.txt"
    fi
    touch "$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
