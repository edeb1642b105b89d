// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/column_sums.h"

namespace minbert {

// out[t] = sum of the rows of task t: the bias gradients of a linear layer. x [N, H], fp32 or bf16.
struct ColumnSums {
  DType dtype;
  int64_t rows, width;
  const void* x;
  Segments segments;
  TaskGradient out;
  float* slots;  // room for the sums of cpu/column_sums.h
};

MINBERT_KERNEL(column_sums, (const ColumnSums& op, int threads))

}  // namespace minbert
