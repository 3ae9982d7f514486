#!/usr/bin/env bash
# Fine-tune a Llama of 36.8M parameters whose training state is four times the host memory that it is given.
#
#   bash scripts/quickstart.sh [FOLDER]        (default: ./quickstart; PYTHON=python3.12 chooses the interpreter)
#
# venv/, model/ and data.jsonl in FOLDER are made the first time and kept; a second run trains into run-2/.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
mkdir -p "${1:-quickstart}"
cd "${1:-quickstart}"
folder=$PWD

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "quickstart: $python is not Python 3.10 or newer: set PYTHON to one that is." >&2
    exit 2
fi

echo "1/4  Installing fuyou into $folder/venv (the first time with PyTorch, which can take minutes)"
[ -x venv/bin/python ] || "$python" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$repo/constraints.txt" "$repo[hf]"

echo "2/4  Making a model, a tokenizer and data from the standard library's docstrings"
venv/bin/python "$repo/scripts/quickstart_setup.py" "$repo/examples/quickstart.yaml"

run=1
while [ -e "run-$run" ]; do run=$((run + 1)); done
echo "3/4  Training into $folder/run-$run"
summary=$(venv/bin/fuyou train "$repo/examples/quickstart.yaml" --set "output=run-$run")  # the bar is on stderr

echo "4/4  What came of it, in $folder"
status=0
venv/bin/python "$repo/scripts/quickstart_show.py" "run-$run" || status=$?
printf '\nPeak memory by tier and category, against the budgets:\n%s\n' "$summary"
exit $status
