#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that waits for a CUDA machine, unattended: build, GPU tests, a training run, all benchmarks, compute-sanitizer.
#
#   bash benchmarks/gpu.sh [tests train step surgery kernels encode sanitizer]     (all, in this order)
#
# Whatever is asked for, the extension is built first, which takes no time where it is up to date: each part can be a
# call of its own. Every command may take LIMIT seconds, and runs whatever became of the one before; benchmarks write
# their results as they go. The last lines say how each ended, and the exit status sums it up.
set -uo pipefail

PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
LIMIT=${LIMIT:-540}
mkdir -p "$RESULTS"
report=()
failed=0

part() { # part NAME COMMAND...
    local name=$1 began=$SECONDS status=0
    shift
    echo "== $name: $*"
    timeout --signal=INT --kill-after=20 "$LIMIT" "$@" || status=$?
    report+=("$name: $([ $status -eq 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - began)) s")
    [ $status -eq 0 ] || failed=1
}

# Other versions of other libraries than the suite is kept clean with may warn here. Compiling kernels takes most of the
# time, so several processes share the tests where pytest-xdist is installed.
tests=(-m pytest -q -W default -p no:cacheprovider)
"$PYTHON" -c "import xdist" 2>/dev/null && tests+=(-n 8)

# Tests that touch the compiled extension, and its kernels alone: the sanitizer slows everything down. Each tensor is an
# allocation of its own there, so that what lies behind it is out of bounds (and no graph can be captured).
sanitized=(-m pytest -q -W default -p no:cacheprovider tests/surgery tests/ops/test_gram.py tests/ops/test_combine.py
    tests/ops/test_adamw.py -m gpu
    -k "not triton and not torch and not opcheck and not compiled and not 32_bits and not graph")

run() { # run PART
    case $1 in
        tests)
            part "tests" "$PYTHON" "${tests[@]}" -m gpu --ignore tests/ops
            part "kernel tests" "$PYTHON" "${tests[@]}" tests/ops # on a GPU, all of them run there
            ;;
        train) part "train" "$PYTHON" -m minbert_fast.train --device cuda --output runs/gpu --overwrite ;;
        step | surgery | kernels | encode)
            part "benchmark $1" "$PYTHON" -m benchmarks.run "$1" --device cuda --json "$RESULTS/cuda-$1.json"
            ;;
        sanitizer)
            local tool own=()
            for tool in memcheck racecheck initcheck; do
                # initcheck has to see who writes memory, so all kernels.
                [ $tool = initcheck ] || own=(--kernel-regex kns=minbert)
                compute-sanitizer --help 2>/dev/null | grep -q -- --kernel-regex || own=()
                part "sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                    compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 "${own[@]}" \
                    "$PYTHON" "${sanitized[@]}"
                own=()
                part "sanitizer $tool, training" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                    compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
                    "$PYTHON" -m minbert_fast.train --device cuda --output runs/sanitized --overwrite \
                    --max-steps 2 --batch-size 4 --set training.graphs=false --set training.evaluate_untrained=false
            done
            ;;
        *)
            echo "gpu.sh: no part $1" >&2
            failed=1
            ;;
    esac
}

part "build" "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
[ $# -gt 0 ] || set -- tests train step surgery kernels encode sanitizer
for name in "$@"; do
    run "$name"
done

printf '%s\n' "${report[@]}"
exit $failed
