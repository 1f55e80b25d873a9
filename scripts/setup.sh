#!/usr/bin/env bash
# Creates .venv and installs tapct into it with the versions of constraints.txt. Does nothing if
# that is already done.
#   scripts/setup.sh          to use tapct
#   scripts/setup.sh dev      also the tools to test and develop it
# PyPI serves the CUDA build of torch (gigabytes). Without a GPU, the CPU build is smaller:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu scripts/setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra="${1:-}"

find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: tapct needs Python 3.10 or newer; python3 here is $(python3 -V 2>&1 || true)." \
        "Install one, or name it: PYTHON=/path/to/python3 $0" >&2
    return 1
}

mkdir -p .venv
exec 9>.venv/.lock
if command -v flock >/dev/null; then flock 9; fi # of two scripts at once, the second one waits

stamp=".venv/.installed-$(cat pyproject.toml constraints.txt <(pwd) | cksum | tr -d ' ')"
if .venv/bin/python -c '' 2>/dev/null && { [ -e "$stamp-$extra" ] || [ -e "$stamp-dev" ]; }; then
    exit 0
fi

python="$(find_python)"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null || {
        echo "error: $python lacks venv; install it (Debian, Ubuntu: apt install python3-venv)" >&2
        exit 1
    }
    "$python" -m venv .venv
fi
echo "installing tapct into .venv (some minutes the first time) ..."
# pip would compile all 17,000 modules of these packages, though few are ever imported. Python
# compiles a module at its first import; the last line imports most of those that tapct needs.
# Images of containers often set PYTHONDONTWRITEBYTECODE; then every start of tapct would compile
# torch again, which takes 3 to 10 s.
.venv/bin/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt \
    -e ".${extra:+[$extra]}"
env -u PYTHONDONTWRITEBYTECODE \
    .venv/bin/python -c 'import tapct.run.pretrain, tapct.run.finished, tapct.cli'
rm -f .venv/.installed-*
touch "$stamp-$extra"
