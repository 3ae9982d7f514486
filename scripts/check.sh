#!/usr/bin/env bash
# Everything a change must pass, for people and CI alike: bash scripts/check.sh [pytest's arguments]
#
# ruff (lint, format), mypy on fuyou/, clang-format, a wheel built from a clean copy with every compiler warning an error,
# and the tests. Runs all of them and names what failed. The environment is that of scripts/test.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=${FUYOU_TEST_VENV:-$root/.venv-test}
failed=()

step() {
    local name=$1
    shift
    echo "--- $name"
    "$@" || failed+=("$name")
}

strict_wheel() {
    local clean=$1 wheel
    cp -r "$root"/{pyproject.toml,setup.py,README.md,csrc,fuyou} "$clean"
    find "$clean" \( -name '*.so' -o -name '__pycache__' -o -name '_native_build_error.txt' \) -prune -exec rm -rf {} +
    (cd "$clean" && FUYOU_NATIVE=strict "$venv/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation -w dist .) || return
    wheel=("$clean"/dist/*.whl)
    "$venv/bin/python" - "${wheel[0]}" <<'PY'
import sys, zipfile
names = zipfile.ZipFile(sys.argv[1]).namelist()
missing = [end for end in ("fuyou/py.typed", "fuyou/_native.pyi") if end not in names]
if not any(name.startswith("fuyou/_native.") and name.endswith(".so") for name in names):
    missing.append("fuyou/_native.*.so")
sys.exit(f"the wheel lacks {', '.join(missing)}" if missing else 0)
PY
}

# Sets the environment up where it is not, and proves that the tests can be collected.
bash scripts/test.sh --collect-only -q >/dev/null || { echo "check.sh: scripts/test.sh cannot collect the tests" >&2; exit 1; }
bin=$venv/bin
clean=$(mktemp -d)
trap 'rm -rf "$clean"' EXIT

step "ruff check" "$bin/ruff" check .
step "ruff format" "$bin/ruff" format --check .
step "mypy" "$bin/mypy"
step "clang-format" "$bin/clang-format" --dry-run -Werror csrc/*.cpp csrc/*.hpp tests/native/*.cpp tests/faults/*.c
step "wheel, warnings are errors" strict_wheel "$clean"
step "tests" bash scripts/test.sh -q "$@"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all checks passed"
