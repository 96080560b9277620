#!/usr/bin/env bash
# tools/install.sh EXTRA: set up .venv and install the project with an extra, at the versions of requirements.txt.
# uv is several times as fast as pip: it is used where it is there, else fetched like any package. Where it cannot be
# had, or does not know the machine's package index, pip does the same. No bytecode is compiled: most is never run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
fits='import sys; sys.exit(not (3, 11, 5) <= sys.version_info < (3, 13))'     # what requirements.txt needs
refuse() {
    echo "$("$1" --version 2>&1) at $(command -v "$1"): expected 3.11.5 or later, or 3.12; $2" >&2
    exit 1
}
if ! test -x $python; then
    "${PYTHON:-python3}" -c "$fits" || refuse "${PYTHON:-python3}" 'try: make PYTHON=python3.12 install'
    "${PYTHON:-python3}" -m venv .venv
fi
$python -c "$fits" || refuse $python 'delete .venv and try: make PYTHON=python3.12 install'
uv=$(command -v uv || command -v .venv/bin/uv || true)
if [ -z "$uv" ] && $python -m pip install -q --no-compile --disable-pip-version-check uv 2>/dev/null; then uv=.venv/bin/uv; fi
what=(-c requirements.txt -e ".[$1]")
if [ -n "$uv" ] && UV_LINK_MODE=${UV_LINK_MODE:-copy} "$uv" pip install -q --python $python "${what[@]}"; then exit; fi
exec $python -m pip install -q --no-compile --disable-pip-version-check "${what[@]}"
