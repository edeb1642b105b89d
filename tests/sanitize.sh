#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the CPU code under sanitizers beside the ordinary build (build/sanitized-*), and runs the tests that exercise it,
# or those given. They compile the CUDA kernels for the CPU with the same flags (tests/without_gpu/cuda_on_cpu). Any finding fails the
# run and is printed at its end.
#
#   tests/sanitize.sh [address] [TEST ...]    AddressSanitizer and UndefinedBehaviorSanitizer
#   tests/sanitize.sh thread [TEST ...]       ThreadSanitizer, on four threads (csrc/threads.cpp)
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python}
cxx=${CXX:-c++}
kind=address
case ${1:-} in address | thread) kind=$1 && shift ;; esac

# Some tests run the interpreter (all with tiles or fp16 do), plain PyTorch or a compiler instead of the extension, and most of
# the methods of surgery are NumPy.
run= select="not triton and not torch and not opcheck and not compil and not test_grouped and not test_settle"
select="$select and not tile and not fp16 and not test_training and (native or cuda or not test_weights)"
if [ "$kind" = address ]; then
  sanitizers=address,undefined flags=-fno-sanitize-recover=all library=libasan.so
  [ $# -gt 0 ] || set -- tests/surgery tests/ops tests/without_gpu/cuda_on_cpu tests/test_native_build.py
else
  sanitizers=thread flags=-DMINBERT_PLAIN_THREADS library=libtsan.so
  [ $# -gt 0 ] || set -- tests/surgery/test_weights.py tests/ops tests/without_gpu/cuda_on_cpu tests/test_native_build.py
  export OMP_NUM_THREADS=4 MKL_NUM_THREADS=4  # torch goes by the smaller one
  # All instruction sets share out work alike, ThreadSanitizer sees no instructions that are named one by one, and the races of
  # a kernel do not depend on the gradients.
  select="$select and not avx and not naive_loop"
  # Older ThreadSanitizers refuse the memory layouts that some kernels draw.
  ! setarch "$(uname -m)" -R true 2>/dev/null || run="setarch $(uname -m) -R"
fi

# At -O1 and with line numbers alone (-g1) the build takes a third of the time. But -O1 fuses no multiplications with
# additions, without which results miss their error budgets: -fexpensive-optimizations does.
export CXXFLAGS="-O1 -fexpensive-optimizations -g1 -fno-omit-frame-pointer -fsanitize=$sanitizers $flags"
MINBERT_FAST_CUDA=0 LDFLAGS="-fsanitize=$sanitizers" \
  "$python" setup.py -q build --build-lib "build/sanitized-$kind" --build-temp "build/sanitized-objects-$kind"

for test in "$@"; do
  shift
  set -- "$@" "$root/$test"
done

# The sanitized copy of the package goes first on the path, so the tests run from a folder that is not the checkout.
# (--import-mode: nor may pytest put the checkout first). An interpreter keeps objects alive on purpose, so leaks are
# not looked for. torch and the interpreter are not instrumented, and what they do is not judged. Beside AddressSanitizer,
# UndefinedBehaviorSanitizer knows no log_path, so pytest leaves the standard error alone (--capture).
rm -rf "build/sanitized-run-$kind"
mkdir -p "build/sanitized-run-$kind"
cd "build/sanitized-run-$kind"
common=log_path=$PWD/finding
status=0
LD_PRELOAD="$("$cxx" -print-file-name=$library) $("$cxx" -print-file-name=libstdc++.so.6)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:$common UBSAN_OPTIONS=print_stacktrace=1:$common \
TSAN_OPTIONS=ignore_noninstrumented_modules=1:$common \
PYTHONPATH="$root/build/sanitized-$kind:$root" MINBERT_FAST_SANITIZED="$root/build/sanitized-$kind" \
  $run "$python" -m pytest -q --capture=sys --import-mode=append -p no:cacheprovider \
  --rootdir "$root" -c "$root/pyproject.toml" -m "not ci" -k "$select" "$@" \
  || status=$?
for finding in finding.*; do
  [ ! -e "$finding" ] || { cat "$finding" && status=1; }
done
exit $status
