#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that waits for a CUDA machine, unattended and without a network: build, tests, a profile, all benchmarks, training,
# compute-sanitizer.
#
#   bash benchmarks/gpu.sh [PART ...]       all parts, in the order of PARTS below, take a quarter of an hour without the last four
#   DRY_RUN=1 bash benchmarks/gpu.sh        prints the commands
#
# Each command ends within its own limit (seconds; LIMIT sets one for all), prints a row as soon as it is measured, and runs
# whatever became of the one before. Benchmarks write their results to RESULTS as they go. At the end everything that was
# written is in one archive, ARCHIVE; the last lines say how each command ended, and the exit status sums it up. Real data and
# weights are used where MINBERT_FAST_DATA and MINBERT_FAST_MINILM name them; nothing needs them.
set -uo pipefail
cd "$(dirname "$0")/.."

PARTS=(build tests profile step kernels surgery encode train dropin compiled sanitizer reproduce ideas launches)
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
ARCHIVE=${ARCHIVE:-gpu-results.tar.gz}
DRY_RUN=${DRY_RUN:-}
logs=runs/gpu-logs
report=()
failed=0
mkdir -p "$RESULTS" "$logs"

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=${LIMIT:-$2} began=$SECONDS status=0
    shift 2
    echo "== $name, at most $limit s: $*"
    [ -z "$DRY_RUN" ] || return 0
    timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tee "$logs/${name// /-}.txt" || status=${PIPESTATUS[0]}
    report+=("$name: $([ $status -eq 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - began)) s")
    [ $status -eq 0 ] || failed=1
}

measure() { # measure SUITE SECONDS
    part "$1" "$2" "$PYTHON" -m benchmarks.run "$1" --device cuda --json "$RESULTS/cuda-$1.json"
}

# The compute capability of the present chip, so that nothing is compiled for others ("90").
chip() { "$PYTHON" -c 'import torch; print(*torch.cuda.get_device_capability(), sep="")' 2>/dev/null; }

# Other versions of other libraries than the suite is kept clean with may warn here. Compiling kernels takes most of the
# time, so several processes share the tests where pytest-xdist is installed.
tests() { # tests NAME SECONDS PROCESSES ARGUMENTS...
    local name=$1 limit=$2 processes=$3
    shift 3
    local command=(-m pytest -q -W default -p no:cacheprovider)
    "$PYTHON" -c "import xdist" 2>/dev/null && command+=(-n "$processes")
    part "$name" "$limit" "$PYTHON" "${command[@]}" "$@"
}

# Tests that touch the compiled extension, and its kernels alone: the sanitizer slows everything down. Each tensor is an
# allocation of its own there, so that what lies behind it is out of bounds (and no graph can be captured).
sanitized=(-m pytest -q -W default -p no:cacheprovider tests/surgery tests/ops/test_gram.py tests/ops/test_combine.py
    tests/ops/test_adamw.py -m gpu
    -k "not triton and not torch and not opcheck and not compiled and not 32_bits and not graph")

sanitizer() {
    local tool own
    for tool in memcheck racecheck initcheck; do
        own=(--kernel-regex kns=minbert)
        # initcheck has to see who writes memory, so all kernels; and older versions cannot choose.
        if [ $tool = initcheck ] || ! compute-sanitizer --help 2>/dev/null | grep -q -- --kernel-regex; then own=(); fi
        part "sanitizer $tool" 540 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 "${own[@]}" \
            "$PYTHON" "${sanitized[@]}"
        part "sanitizer $tool, training" 540 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
            "$PYTHON" -m minbert_fast.train --device cuda --precision auto --output runs/sanitized --overwrite \
            --max-steps 2 --batch-size 4 --set training.graphs=false --set training.evaluate_untrained=false
    done
}

run() { # run PART
    case $1 in
        build)
            part "build" 120 env MINBERT_FAST_CUDA_ARCHITECTURES="$(chip)" \
                "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
            ;;
        tests) # both groups side by side; on a GPU, all tests of the ops run there
            (failed=0 && tests "kernel tests" 240 9 tests/ops && exit "$failed") &
            local beside=$! began=$SECONDS
            tests "tests" 240 5 -m gpu --ignore tests/ops
            if wait "$beside"; then
                report+=("kernel tests: passed, beside the others")
            else
                report+=("kernel tests: FAILED, beside the others ($((SECONDS - began)) s for both)")
                failed=1
            fi
            ;;
        profile) part "profile" 90 "$PYTHON" -m benchmarks.step_profile --json "$RESULTS/cuda-profile.json" ;;
        step) measure step 150 ;;
        kernels) measure kernels 150 ;;
        launches) part "launches" 400 "$PYTHON" -m benchmarks.launches --json "$RESULTS/cuda-launches.json" ;;
        surgery) measure surgery 90 ;;
        encode) measure encode 120 ;;
        dropin) measure dropin 60 ;;
        compiled) measure compiled 400 ;;
        train) part "train" 120 "$PYTHON" -m minbert_fast.train --device cuda --precision auto --output runs/gpu --overwrite ;;
        sanitizer) sanitizer ;;
        reproduce)
            local real=()
            [ -z "${MINBERT_FAST_DATA:-}" ] || real+=(--data "$MINBERT_FAST_DATA")
            [ -z "${MINBERT_FAST_MINILM:-}" ] || real+=(--model "$MINBERT_FAST_MINILM")
            part "reproduce" 540 "$PYTHON" -m minbert_fast.reproduce "${real[@]}" --output runs/reproduce
            ;;
        ideas)
            if [ -z "${MINBERT_FAST_DATA:-}" ] || [ -z "${MINBERT_FAST_MINILM:-}" ]; then
                echo "== ideas: left out, it needs real data and weights (MINBERT_FAST_DATA, MINBERT_FAST_MINILM)"
                return 0
            fi
            for series in screen ideas; do  # the first takes half as long
                part "$series" 540 "$PYTHON" -m benchmarks.ablation "$series" --data "$MINBERT_FAST_DATA" \
                    --model "$MINBERT_FAST_MINILM" --output runs/ideas --json "$RESULTS/cuda-$series.json"
            done
            ;;
        *)
            echo "gpu.sh: no part $1 (parts: ${PARTS[*]})" >&2
            failed=1
            ;;
    esac
}

[ $# -gt 0 ] || set -- "${PARTS[@]}"
for name in "$@"; do
    run "$name"
done
if [ -z "$DRY_RUN" ]; then
    tar -czf "$ARCHIVE" --ignore-failed-read $(ls -d "$RESULTS"/cuda-*.json "$logs" 2> /dev/null) \
        $(ls -d runs/gpu/{summary.json,metrics.jsonl} runs/reproduce/*.{json,md} 2> /dev/null)
    printf '%s\n' "${report[@]}" "everything is in $ARCHIVE"
fi
exit $failed
