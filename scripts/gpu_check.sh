#!/usr/bin/env bash
# For a machine with a GPU: bash scripts/gpu_check.sh OUT
#
# Needs a python3 ($PYTHON for another) that has torch with CUDA, pybind11 and pytest, and a C++ compiler; no network.
# Builds the extension in place, runs the tests marked gpu and the step bench on the device, and writes into OUT:
# machine.json, build.log, tests.log, tests.xml, bench_step.json, bench_step.log, status.json. Under 8 minutes.
set -uo pipefail
if (($# != 1)); then
    echo "usage: bash scripts/gpu_check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8} # deterministic matrix products

"$python" -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "gpu_check.sh: torch sees no CUDA device")' || exit 2
"$python" scripts/bench_step.py --machine "$out/machine.json"

echo "--- build"
timeout 120 "$python" setup.py build_ext --inplace >"$out/build.log" 2>&1
build=$?
((build == 0)) || tail -n 20 "$out/build.log"

echo "--- tests"
timeout 210 "$python" -m pytest -m gpu -q -rs -p no:cacheprovider --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.log"
tests=${PIPESTATUS[0]}

echo "--- bench"
timeout 130 "$python" scripts/bench_step.py --device cuda --rounds 2 --steps 3 --json "$out/bench_step.json" 2>&1 |
    tee "$out/bench_step.log"
bench=${PIPESTATUS[0]}

printf '{"build": %d, "tests": %d, "bench_step": %d}\n' "$build" "$tests" "$bench" | tee "$out/status.json"
# pytest's 5 is "no test ran", which here is a failure too
((build == 0 && tests == 0 && bench == 0))
