// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/column_sums.h"

namespace minbert {

// y = GELU(x + bias), the erf form. x, y and their gradients [N, F], fp32 or bf16; bias [F] fp32.
struct BiasGelu {
  DType dtype;
  int64_t rows, width;
  const void* x;
  const float* bias;
  // Forward.
  void* y;
  // Backward.
  const void* dy;
  Segments segments;
  void* dx;
  TaskGradient dbias;
  float* slots;  // room for the sums of cpu/column_sums.h
};

MINBERT_KERNEL(bias_gelu_forward, (const BiasGelu& op, int threads))
MINBERT_KERNEL(bias_gelu_backward, (const BiasGelu& op, int threads))

}  // namespace minbert
