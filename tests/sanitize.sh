#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the CPU code with AddressSanitizer and UndefinedBehaviorSanitizer beside the ordinary build (build/sanitized),
# and runs the tests that exercise it, or those given as arguments. Any finding ends the run with its report.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python}
flags="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"

MINBERT_FAST_CUDA=0 CXXFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" \
  "$python" setup.py -q build --build-lib build/sanitized --build-temp build/sanitized-objects

[ $# -gt 0 ] || set -- tests/surgery tests/test_native_build.py tests/test_native_attention.py
for test in "$@"; do
  shift
  set -- "$@" "$root/$test"
done

# The sanitized copy of the package goes first on the path, so the tests run from a folder that is not the checkout.
# (--import-mode: nor may pytest put the checkout first). An interpreter keeps objects alive on purpose, so leaks are
# not looked for.
mkdir -p build/sanitized-run
cd build/sanitized-run
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libstdc++.so.6)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
PYTHONPATH="$root/build/sanitized:$root" MINBERT_FAST_SANITIZED="$root/build/sanitized" \
  "$python" -m pytest -q --import-mode=append -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml" "$@"
