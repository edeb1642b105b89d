// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/column_sums.h"
#include "cpu/philox.h"

namespace minbert {

// A table of rows [count, H] and, for each of N tokens, which of them it takes.
struct Lookup {
  const void* table;
  int64_t count;
  const int32_t* index;  // [N]
};

// y = dropout(LayerNorm(word[tokens] + position[positions] + type[types])). Tables, y and dy fp32 or bf16; vectors [H],
// mean and rstd [N] fp32.
struct Embedding {
  DType dtype;
  int64_t rows, width;
  Lookup lookups[3];  // word, position, type
  const float* gamma;
  Dropout dropout;
  // Forward.
  const float* beta;
  float eps;
  void* y;
  float *mean, *rstd;
  // Backward: mean and rstd as the forward wrote them.
  const void* dy;
  Segments segments;
  float* dz;  // [N, H], the gradient of the sum of the three rows; it goes to the tables by gather_sums
  TaskGradient dgamma, dbeta;
  float* slots;  // room for the sums of cpu/column_sums.h
};

// Group g's rows are order[offsets[g]] to order[offsets[g + 1]], ascending.
struct Groups {
  const int32_t* order;
  const int32_t* offsets;
  int64_t count;
};

MINBERT_KERNEL(embedding_forward, (const Embedding& op, int threads))
MINBERT_KERNEL(embedding_backward, (const Embedding& op, int threads))
// out[t, g] = sum of the rows of op.dz that belong to group g and task t.
MINBERT_KERNEL(gather_sums, (const Embedding& op, const Groups& groups, const TaskGradient& out, int threads))

}  // namespace minbert
