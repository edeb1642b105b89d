// SPDX-License-Identifier: Apache-2.0
// The encoder's operations between its matrix products, forward and backward, on the CPU.
//
// N rows (tokens), H their width, T tasks, h heads, d head width. Activations are fp32 or bf16 (`dtype`), biases and
// LayerNorm's weights fp32, statistics fp32, all arithmetic fp32. No result depends on the number of threads.
// Everything throws std::invalid_argument where the contents of an index tensor would lead out of a tensor.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace minbert {

constexpr int64_t kMaxWidth = 8192;  // of a row that LayerNorm takes

// Keep or drop as a pure function of (seed, site, plane, row, column); cpu/philox.h draws it, as kernels/dropout.py does.
struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t site;
  uint32_t threshold;  // drop where a draw is below it: p * 2^32
  float scale;         // 1 / (1 - p)
};

// Token-row bounds of the tasks: task t owns rows bounds[t] to bounds[t + 1]; rows from bounds[T] on are padding.
struct Segments {
  const int32_t* bounds;
  int64_t tasks;
};

// A gradient kept apart by task [T, ...]: task t's begins `stride` elements behind task t - 1's. Null data: not wanted.
struct TaskGradient {
  void* data;
  DType dtype;  // f32 or bf16
  int64_t stride;
};

// y = LayerNorm(residual + dropout(x + bias)); x, residual [N, H]
struct AddNorm {
  DType dtype;
  int64_t rows, width;
  const void *x, *residual;
  const float *bias, *gamma;  // [H]
  Dropout dropout;
};
void add_norm_forward(const AddNorm& op, const float* beta, float eps, void* y, float* mean, float* rstd, int threads);
void add_norm_backward(const AddNorm& op, const void* dy, const float* mean, const float* rstd, const Segments& segments,
                       void* dx, void* dresidual, const TaskGradient& dgamma, const TaskGradient& dbeta,
                       const TaskGradient& dbias, int threads);

// y = GELU(x + bias), the erf form; x [N, F]
struct BiasGelu {
  DType dtype;
  int64_t rows, width;
  const void* x;
  const float* bias;  // [F]
};
void bias_gelu_forward(const BiasGelu& op, void* y, int threads);
void bias_gelu_backward(const BiasGelu& op, const void* dy, const Segments& segments, void* dx,
                        const TaskGradient& dbias, int threads);

// A table of rows [count, H] and, for each of N tokens, which of them it takes.
struct Lookup {
  const void* table;
  int64_t count;
  const int32_t* index;  // [N]
};

// y = dropout(LayerNorm(word[tokens] + position[positions] + type[types]))
struct Embedding {
  DType dtype;
  int64_t rows, width;
  Lookup lookups[3];  // word, position, type
  const float* gamma;  // [H]
  Dropout dropout;
};
void embedding_forward(const Embedding& op, const float* beta, float eps, void* y, float* mean, float* rstd, int threads);
// word_order [N]: rows sorted by (word, row); word_offsets [U + 1]: where each distinct word's rows begin in it.
// dword [T, U, H], dposition [T, S, H], dtype [T, K, H]
void embedding_backward(const Embedding& op, const void* dy, const float* mean, const float* rstd,
                        const Segments& segments, const int32_t* word_order, const int32_t* word_offsets, int64_t words,
                        const TaskGradient& dgamma, const TaskGradient& dbeta, const TaskGradient (&dtables)[3],
                        int threads);

// out[t] = sum of the rows of task t: the bias gradients of a linear layer. x [N, H], rows `stride` apart.
struct ColumnSums {
  DType dtype;
  int64_t rows, width, stride;
  const void* x;
};
void column_sums(const ColumnSums& op, const Segments& segments, const TaskGradient& out, int threads);

// out = softmax(q k^T scale) v within each sentence. qkv [N, 3, h, d], rows `stride` apart.
//
// Packed: sentence b owns rows offsets[b] to offsets[b + 1]. Dense (`kept` not null): sentence b owns `period` rows from
// b * period on, of which those at the ascending places kept[offsets[b]] to kept[offsets[b + 1]] attend and are attended
// to. Rows that take no part get zeros in every output.
struct Attention {
  DType dtype;
  int64_t rows, heads, head_dim, stride;
  const void* qkv;
  const int32_t* offsets;  // [B + 1]
  int64_t sentences;
  const int32_t* kept;
  int64_t period;
  float scale;
  Dropout dropout;
};
// `offsets` and `kept` of dense attention, from mask [sentences, period], where anything but 0 attends.
struct KeptRows {
  std::vector<int32_t> offsets, kept;
  KeptRows(const uint8_t* mask, int64_t sentences, int64_t period);
};
// out [N, h * d], lse [h, N]
void attention_forward(const Attention& op, void* out, float* lse, int threads);
// dout [N, h * d], rows dout_stride apart -> dqkv [N, 3, h, d]
void attention_backward(const Attention& op, const void* dout, int64_t dout_stride, const float* lse, void* dqkv,
                        int threads);

}  // namespace minbert
