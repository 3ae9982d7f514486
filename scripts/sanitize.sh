#!/usr/bin/env bash
# The native code under the sanitizers: bash scripts/sanitize.sh [asan|tsan|all] [FOLDER]
#
#   asan   address and undefined-behaviour sanitizer: tests/native/stress.cpp, and the native tests in Python with an
#          extension built the same way (tests of faults too, those that load a library of their own before it excepted)
#   tsan   thread sanitizer: tests/native/stress.cpp. Python and torch are not built with it, and it would report their
#          locks as missing; so the extension's own sources run in a program of their own
#
# FOLDER is on a real drive and is made (default: a new one under TMPDIR or /var/tmp). The installed extension is left as
# it is. Exit 0 only where everything ran and nothing was found. PYTHON names the interpreter; the default is python3.
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-all}
python=${PYTHON:-python3}
compiler=${CXX:-g++}
case $what in asan | tsan | all) ;; *) sed -n '2,12p' "$0" >&2; exit 2 ;; esac
work=${2:-$(mktemp -d "${TMPDIR:-/var/tmp}/fuyou-sanitize-XXXXXX")}
mkdir -p "$work"
trap 'rm -rf "$work"' EXIT

# Whatever a sanitizer finds ends the program with an error; nothing is suppressed in fuyou's own code.
common="-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -pthread -Icsrc"
address="-fsanitize=address,undefined -fno-sanitize-recover=all"
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# Python and torch keep much for the life of the process: leaks are looked for in the program, not in the interpreter.
export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1

stress() { # name, flags
    echo "sanitize.sh: $1: building and running tests/native/stress.cpp"
    local sources=()
    for source in csrc/io_queue.cpp csrc/io_ring.cpp csrc/io_threads.cpp csrc/io_uring.cpp csrc/adam_*.cpp; do
        case $source in *_bindings.cpp) ;; *) sources+=("$source") ;; esac
    done
    # shellcheck disable=SC2086
    for source in "${sources[@]}" tests/native/stress.cpp; do
        $compiler $common $2 -c "$source" -o "$work/$1-$(basename "$source").o" &
        [[ $(jobs -rp | wc -l) -lt 2 ]] || wait -n
    done
    wait
    # shellcheck disable=SC2086
    $compiler $common $2 "$work/$1"-*.o -o "$work/stress-$1"
    "$work/stress-$1" "$work"
}

python_tests() {
    echo "sanitize.sh: asan: building the extension and running the native tests"
    mkdir -p "$work/repository"
    cp -r csrc fuyou tests setup.py pyproject.toml README.md "$work/repository/"
    rm -f "$work"/repository/fuyou/_native*.so
    (
        cd "$work/repository"
        CXX=$compiler CC=$compiler CFLAGS="-O1 -g -fno-omit-frame-pointer $address" LDFLAGS="$address" FUYOU_NATIVE=strict \
            "$python" setup.py -q build_ext --inplace
        export PYTHONPATH="$work/repository" FUYOU_SANITIZED=asan
        export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
        export ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0
        "$python" -m pytest -q -p no:cacheprovider -o addopts= --basetemp="$work/tests" \
            tests/test_io.py tests/test_tuning.py tests/test_adam*.py tests/test_faults_*.py \
            -m "not slow and not gpu"
    )
}

if [[ $what != tsan ]]; then
    stress asan "$address"
    python_tests
fi
if [[ $what != asan ]]; then
    stress tsan "-fsanitize=thread"
fi
echo "sanitize.sh: $what: clean"
