// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/column_sums.h"
#include "cpu/philox.h"

namespace minbert {

// y = LayerNorm(residual + dropout(x + bias)). x, residual, y and their gradients [N, H], fp32 or bf16; vectors [H], mean
// and rstd [N] fp32.
struct AddNorm {
  DType dtype;
  int64_t rows, width;
  const void *x, *residual;
  const float *bias, *gamma;
  Dropout dropout;
  // Forward.
  const float* beta;
  float eps;
  void* y;
  float *mean, *rstd;
  // Backward: mean and rstd as the forward wrote them.
  const void* dy;
  Segments segments;
  void *dx, *dresidual;
  TaskGradient dgamma, dbeta, dbias;
  float* slots;  // room for the sums of cpu/column_sums.h
};

MINBERT_KERNEL(add_norm_forward, (const AddNorm& op, int threads))
MINBERT_KERNEL(add_norm_backward, (const AddNorm& op, int threads))

}  // namespace minbert
