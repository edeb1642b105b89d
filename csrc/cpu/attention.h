// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/parallel.h"
#include "cpu/philox.h"

namespace minbert {

// The heads [first, last) of one sentence, the unit of work of a thread.
struct AttentionItem {
  int32_t sentence, first, last;
};

// out = softmax(q k^T scale) v within each sentence. qkv, dqkv [N, 3, h, d] and out, dout [N, h * d], fp32 or bf16; lse
// [h, N] fp32.
//
// Packed: sentence b owns rows offsets[b] to offsets[b + 1]. Dense (`kept` not null): sentence b owns `period` rows from
// b * period on, of which those at the ascending places kept[offsets[b]] to kept[offsets[b + 1]] attend and are attended
// to. Rows that take part in no sentence get zeros in every output.
struct Attention {
  DType dtype;
  int64_t rows, heads, head_dim;
  const void* qkv;
  const int32_t* offsets;  // [B + 1]
  int64_t sentences;
  const int32_t* kept;
  int64_t period;
  float scale;
  Dropout dropout;
  // Forward.
  void* out;
  float* lse;
  // Backward: lse as the forward wrote it.
  const void* dout;
  void* dqkv;
  // The plan: items in the order that threads take them, and `pitch` floats of scratch for each thread.
  const AttentionItem* items;
  int64_t count;
  float* scratch;
  int64_t pitch;
};

// Queries in a block: all of a short sentence.
constexpr int64_t kAttentionBlock = 64;
inline int64_t attention_block(int64_t n) { return n <= kAttentionBlock ? n : 48; }

// Floats of scratch for sentences of up to `longest` attended rows among `places`, with registers of up to 16 floats.
// Blocks count at their longest: a sentence of 64 rows has longer blocks than one of 65.
inline int64_t attention_scratch(int64_t longest, int64_t places, int64_t head_dim) {
  const int64_t n = longest, N = (n + 15) / 16 * 16, D = (head_dim + 15) / 16 * 16;
  const int64_t M = n < kAttentionBlock ? n : kAttentionBlock;
  return (places + 31) / 32 * 32 + 4 * n * D + 2 * D * N + 5 * M * D + 4 * M * N;
}

MINBERT_KERNEL(attention_forward, (const Attention& op, int threads))
MINBERT_KERNEL(attention_backward, (const Attention& op, int threads))

}  // namespace minbert
