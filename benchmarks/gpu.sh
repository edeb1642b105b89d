#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that waits for a CUDA machine, unattended: build, GPU tests, compute-sanitizer, all benchmarks.
# Each part runs whatever became of the one before; the last lines say how each ended, and the exit status sums it up.
set -uo pipefail

PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-benchmarks/results}
mkdir -p "$RESULTS"
report=()
failed=0

part() { # part NAME COMMAND...
    local name=$1 began=$SECONDS status=0
    shift
    echo "== $name: $*"
    "$@" || status=$?
    report+=("$name: $([ $status -eq 0 ] && echo passed || echo "FAILED ($status)"), $((SECONDS - began)) s")
    [ $status -eq 0 ] || failed=1
}

# Tests that touch the compiled extension; the sanitizer slows everything down, so nothing else.
sanitized=(tests/surgery -m gpu -q -p no:cacheprovider)

part build "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
part tests "$PYTHON" -m pytest -q -m gpu
for tool in memcheck racecheck initcheck; do
    part "sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest "${sanitized[@]}"
done
for suite in kernels surgery step encode; do
    part "benchmark $suite" "$PYTHON" -m benchmarks.run "$suite" --device cuda --json "$RESULTS/cuda-$suite.json"
done

printf '%s\n' "${report[@]}"
exit $failed
