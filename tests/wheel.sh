#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the sdist and, from the unpacked sdist, the CPU wheel (dist/, or the folder given), then tries the wheel in a clean
# environment from another directory: the demonstration trains, is evaluated, encodes, predicts and is exported.
#   PYTHON=.venv/bin/python tests/wheel.sh [FOLDER]
# Where auditwheel is installed the wheel becomes a manylinux one. PYTHON is the interpreter to build for and try with.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
mkdir -p "${1:-dist}"
dist=$(cd "${1:-dist}" && pwd)
rm -f "$dist"/minbert_fast-*

# CUDA users build from source, for their own GPU and toolkit.
MINBERT_FAST_CUDA=0 "$python" -m build --outdir "$dist" # a wheel from the sdist, as installers would

# libgomp stays outside: torch, imported first, brings it under the same name, and two of them in one process would keep
# two teams of threads for the same cores.
wheel=$(ls "$dist"/minbert_fast-*.whl)
if "$python" -c "import auditwheel" 2>/dev/null; then
    PATH=$(dirname "$(command -v "$python")"):$PATH \
        "$python" -m auditwheel repair --exclude libgomp.so.1 --wheel-dir "$dist" "$wheel"
    [ "$(ls "$dist"/minbert_fast-*.whl | wc -l)" -eq 1 ] || rm "$wheel"
    wheel=$(ls "$dist"/minbert_fast-*manylinux*.whl)
fi

elsewhere=$(mktemp -d)
trap 'rm -rf "$elsewhere"' EXIT
"$python" -m venv "$elsewhere/venv"
"$elsewhere/venv/bin/python" -m pip install --quiet -c "${CONSTRAINTS:-$root/constraints.txt}" "$wheel"
cd "$elsewhere"
run() { PATH=$elsewhere/venv/bin:$PATH python "$@"; }
run -c "
import minbert_fast, minbert_fast.kernels, minbert_fast.ops.native
assert minbert_fast.__file__.startswith('$elsewhere'), minbert_fast.__file__
"
sample=$(run -c "from minbert_fast.data import sample_directory; print(sample_directory().data)")
run -m minbert_fast.env
run -m minbert_fast.train --output run ${STEPS:+--max-steps "$STEPS"}
run -m minbert_fast.evaluate --checkpoint run/best --data "$sample"
run -m minbert_fast.encode --model run/best --input "$sample/ids-sst-dev.csv" --output vectors.npy
run -m minbert_fast.predict --checkpoint run/best --task sentiment --input "$sample/ids-sst-dev.csv" --output sst.csv
run -m minbert_fast.export --checkpoint run/best --format huggingface --output exported
for file in run/report.html vectors.npy sst.csv exported/model.safetensors; do test -s "$file"; done
echo "works: $(basename "$wheel")"
