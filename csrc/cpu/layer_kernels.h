// SPDX-License-Identifier: Apache-2.0
// The inner loops of csrc/layers.h, one version per instruction set. Scratch memory and plans come from csrc/layers.cpp.
#pragma once

#include "cpu/parallel.h"
#include "layers.h"

namespace minbert {

// `slots`: room for the sums of cpu/column_sums.h, as many floats as slot_floats says.
MINBERT_KERNEL(add_norm_rows, (const AddNorm& op, const float* beta, float eps, void* y, float* mean, float* rstd,
                               int threads))
MINBERT_KERNEL(add_norm_rows_backward,
               (const AddNorm& op, const void* dy, const float* mean, const float* rstd, const Segments& segments,
                void* dx, void* dresidual, const TaskGradient& dgamma, const TaskGradient& dbeta,
                const TaskGradient& dbias, float* slots, int threads))

MINBERT_KERNEL(bias_gelu_rows, (const BiasGelu& op, void* y, int threads))
MINBERT_KERNEL(bias_gelu_rows_backward, (const BiasGelu& op, const void* dy, const Segments& segments, void* dx,
                                         const TaskGradient& dbias, float* slots, int threads))

MINBERT_KERNEL(embedding_rows, (const Embedding& op, const float* beta, float eps, void* y, float* mean, float* rstd,
                                int threads))
// dz [N, H]: the gradient of the sum of the three rows; it goes to the tables by gather_sums.
MINBERT_KERNEL(embedding_rows_backward,
               (const Embedding& op, const void* dy, const float* mean, const float* rstd, const Segments& segments,
                float* dz, const TaskGradient& dgamma, const TaskGradient& dbeta, float* slots, int threads))

// out[t, g] = sum of the rows order[offsets[g]] to order[offsets[g + 1]] of x [N, width] that belong to task t.
struct Groups {
  const int32_t* order;
  const int32_t* offsets;
  int64_t count;
};
MINBERT_KERNEL(gather_sums, (const float* x, int64_t width, const Groups& groups, const Segments& segments,
                             const TaskGradient& out, int threads))

MINBERT_KERNEL(column_sums_rows, (const ColumnSums& op, const Segments& segments, const TaskGradient& out, float* slots,
                                  int threads))

// The heads [first, last) of one sentence: what a thread takes at a time.
struct AttentionItem {
  int32_t sentence, first, last;
};
struct AttentionPlan {
  const AttentionItem* items;
  int64_t count;
  float* scratch;  // `pitch` floats for each thread
  int64_t pitch;
};

// Queries taken at a time: a short sentence whole.
constexpr int64_t kAttentionBlock = 64;
inline int64_t attention_block(int64_t n) { return n <= kAttentionBlock ? n : 48; }

// Floats of scratch for sentences of up to `longest` rows among `places`, whatever the width of a register (at most 16
// floats). A sentence of 64 rows takes longer blocks than one of 65, so blocks count at their longest.
inline int64_t attention_scratch(int64_t longest, int64_t places, int64_t head_dim) {
  const int64_t n = longest, N = (n + 15) / 16 * 16, D = (head_dim + 15) / 16 * 16;
  const int64_t M = n < kAttentionBlock ? n : kAttentionBlock;
  return (places + 31) / 32 * 32 + 4 * n * D + 2 * D * N + 5 * M * D + 4 * M * N;
}

MINBERT_KERNEL(attention_items, (const Attention& op, const AttentionPlan& plan, void* out, float* lse, int threads))
MINBERT_KERNEL(attention_items_backward, (const Attention& op, const AttentionPlan& plan, const void* dout,
                                          int64_t dout_stride, const float* lse, void* dqkv, int threads))

}  // namespace minbert
