#!/usr/bin/env bash
# tools/install.sh EXTRA: set up .venv and install the project with an extra, at the versions of requirements.txt.
# uv is several times as fast as pip: it is used where it is there, else fetched like any package. Where it cannot be
# had, or does not know the machine's package index, pip does the same. No bytecode is compiled: most is never run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
test -x $python || ${PYTHON:-python3} -m venv .venv
uv=$(command -v uv || command -v .venv/bin/uv || true)
if [ -z "$uv" ] && $python -m pip install -q --no-compile --disable-pip-version-check uv 2>/dev/null; then uv=.venv/bin/uv; fi
what=(-c requirements.txt -e ".[$1]")
if [ -n "$uv" ] && UV_LINK_MODE=${UV_LINK_MODE:-copy} "$uv" pip install -q --python $python "${what[@]}"; then exit; fi
exec $python -m pip install -q --no-compile --disable-pip-version-check "${what[@]}"
