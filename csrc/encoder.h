// SPDX-License-Identifier: Apache-2.0
// The encoder's ops on the CPU, as Python calls them. Each checks its arguments (arguments.h) and writes its outputs, which
// stand last but for the number of threads. Dropout has probability p and is drawn from (seed, site).
#pragma once

#include "tensor.h"

namespace minbert {

void add_norm_forward(Tensor x, Tensor bias, Tensor residual, Tensor gamma, Tensor beta, float eps, double p,
                      Tensor seed, int64_t site, Tensor y, Tensor mean, Tensor rstd, int threads);
void add_norm_backward(Tensor dy, Tensor x, Tensor bias, Tensor residual, Tensor gamma, Tensor mean, Tensor rstd,
                       Tensor bounds, double p, Tensor seed, int64_t site, Tensor dgamma, Tensor dbeta, Tensor dbias,
                       Tensor dx, Tensor dresidual, int threads);

void attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor mask, int64_t max_seqlen, float scale, double p,
                       Tensor seed, int64_t site, Tensor out, Tensor lse, int threads);
void attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, Tensor mask,
                        int64_t max_seqlen, float scale, double p, Tensor seed, int64_t site, Tensor dqkv, int threads);

void bias_gelu_forward(Tensor x, Tensor bias, Tensor y, int threads);
void bias_gelu_backward(Tensor dy, Tensor x, Tensor bias, Tensor bounds, Tensor dbias, Tensor dx, int threads);

void embedding_forward(Tensor tokens, Tensor positions, Tensor types, Tensor word, Tensor position, Tensor type,
                       Tensor gamma, Tensor beta, float eps, double p, Tensor seed, int64_t site, Tensor y, Tensor mean,
                       Tensor rstd, int threads);
void embedding_backward(Tensor dy, Tensor tokens, Tensor positions, Tensor types, Tensor word, Tensor position,
                        Tensor type, Tensor gamma, Tensor mean, Tensor rstd, Tensor bounds, Tensor cu_seqlens,
                        Tensor word_order, Tensor word_offsets, double p, Tensor seed, int64_t site, Tensor dword,
                        Tensor dposition, Tensor d_type_table, Tensor dgamma, Tensor dbeta, int threads);

void column_sums(Tensor x, Tensor bounds, Tensor out, int threads);

}  // namespace minbert
