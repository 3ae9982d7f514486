#!/usr/bin/env bash
# Sets itself up and runs the tests: bash scripts/test.sh [pytest's arguments]
#
# Needs Python 3.10 or newer, pip, a C++17 compiler, and package downloads the first time. The environment is .venv-test
# (or $FUYOU_TEST_VENV), kept between runs; the package is installed in place, so that its extension is built as a user's is.
# Another interpreter: PYTHON=python3.12 bash scripts/test.sh    One test at a time: FUYOU_TEST_WORKERS=0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=${FUYOU_TEST_VENV:-$root/.venv-test}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "test.sh: $python is missing or older than Python 3.10; name one that is not: PYTHON=python3.12 $0" >&2
    exit 2
fi

# What the installed package depends on; when any of it changes, the install is repeated.
fingerprint() {
    "$python" - "$root" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [root / name for name in ("pyproject.toml", "setup.py", "constraints.txt")] + sorted(root.glob("csrc/*"))
digest = hashlib.sha256(repr((sys.version, str(root))).encode())
for file in files:
    digest.update(file.name.encode() + b"\0" + file.read_bytes())
print(digest.hexdigest())
PY
}

stamp=$venv/.fuyou-installed
wanted=$(fingerprint)
if [[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]]; then
    version='import sys; print(sys.version)'
    if [[ "$("$venv/bin/python" -c "$version" 2>/dev/null || true)" != "$("$python" -c "$version")" ]]; then
        "$python" -m venv --clear "$venv" # missing, broken, or of another Python
    fi
    rm -f "$stamp"
    echo "test.sh: installing into $(basename "$venv") (first time, or the extension's sources changed)"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[hf,dev]'
    echo "$wanted" >"$stamp"
fi

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two at a time: most tests keep one core busy. Files stay whole, for their fixtures; the slow suite is mostly one file.
share=loadfile
[[ " $* " == *" slow "* ]] && share=worksteal
exec "$venv/bin/python" -m pytest -n "${FUYOU_TEST_WORKERS:-2}" --dist "$share" "$@"
