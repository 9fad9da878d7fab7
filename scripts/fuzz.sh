#!/usr/bin/env bash
# Fuzzes the parsers that face a client or a peer, FUZZ_MINUTES (10) for each family of them, as many at once as there
# are cores. Arguments go to tests/fuzz/campaign.py: names of families, --jobs N, --folder F. Exit status 1 with findings.
set -euo pipefail
cd "$(dirname "$0")/.."

PY=$PWD/.venv/bin/python
if ! "$PY" -c 'import atheris' 2>/dev/null; then
    echo "fuzz: installing atheris (about 35 MB)"
    "$PY" -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[fuzz]' ||
        echo "fuzz: there is no atheris for this Python: inputs are changed without a guide" >&2
fi
PYTHONPATH=$PWD/tests exec "$PY" -m fuzz.campaign --minutes "${FUZZ_MINUTES:-10}" "$@"
