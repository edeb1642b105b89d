// SPDX-License-Identifier: Apache-2.0
// Gradient surgery's inner loops, one version per instruction set (csrc/isa.h says how).
#pragma once

#include "cpu/parallel.h"
#include "surgery.h"

namespace minbert {

// The pieces of J that gram sums apart: fixed by P alone, so that any number of threads adds the same numbers.
inline Chunks gram_chunks(int64_t columns) { return {columns, 8192, 256}; }

// partials [chunks, T (T + 1) / 2]: the upper triangle of each chunk's own Gram matrix, row by row.
MINBERT_KERNEL(gram_partials, (const Matrix& j, double* partials, int threads))

// w null stands for one task of weight 1. Rows of weight zero are not read.
MINBERT_KERNEL(combine_rows, (const Matrix& j, const float* w, float* out, int threads))
MINBERT_KERNEL(adamw_rows, (const Matrix& j, const float* w, const AdamW& to, const AdamWCoefficients& a, int threads))

}  // namespace minbert
