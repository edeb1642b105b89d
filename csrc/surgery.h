// SPDX-License-Identifier: Apache-2.0
// Gradient surgery's four ops (gram, weights, combine, adamw), the same on the CPU and on a GPU.
// T tasks, P parameters, J [T, P] the tasks' gradients.
#pragma once

#include "dtype.h"

namespace minbert {

constexpr int kMaxTasks = 64;

// Where an op runs: on at most `threads` threads of the CPU, or on a stream (cudaStream_t) of a GPU, the current device.
// No result depends on the number of threads. A GPU's ops are queued and wait for nothing; a launch that fails throws
// std::runtime_error.
struct Where {
  int device;
  void* stream;
  int threads;
};

// J: `rows` gradients of `columns` elements, fp32 or bf16, `stride` elements from one row to the next.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, columns, stride;
};

// One AdamW step, its members in the order of AdamWStep in minbert_fast/ops/adamw.py. All are fp32 but the copy.
struct AdamW {
  float *p, *m, *v;  // parameters and Adam's moments
  const float* scalars;
  bfloat16* copy;           // of p, or null
  const int32_t* row_slot;  // row r's gradient is slot row_slot[r] of J [T, slots, width], -1 for none. Null: one row, slot 0
  double lr_factor, beta1, beta2, eps, weight_decay;
  bool correct_bias;
  int64_t count, width;  // parameters, in all and in a row
};

// Positions in the `scalars` tensor. It holds the numbers that change between steps, so a captured graph follows a schedule.
enum Scalar { kLearningRate = 0, kStep = 1, kGradientScale = 2, kSkip = 3 };

// p = decay * (p - rate * m / (sqrt(v) + eps)), with rate = lr * sqrt(1 - beta2^t) / (1 - beta1^t).
struct AdamWCoefficients {
  float scale, beta1, beta2, rest1, rest2, eps, rate, decay;
  bool skip;

  MINBERT_HD void update(float gradient, float& p, float& m, float& v) const {
    const float g = scale * gradient;
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * g * g;
    p = decay * (p - rate * m / (sqrtf(v) + eps));
  }
};

MINBERT_HD inline AdamWCoefficients adamw_coefficients(const AdamW& o) {
  const double lr = o.scalars[kLearningRate] * o.lr_factor, step = o.scalars[kStep];
  const double correction1 = o.correct_bias ? 1 - pow(o.beta1, step) : 1;
  const double correction2 = o.correct_bias ? sqrt(1 - pow(o.beta2, step)) : 1;
  AdamWCoefficients c;
  c.scale = o.scalars[kGradientScale];
  c.beta1 = static_cast<float>(o.beta1);
  c.beta2 = static_cast<float>(o.beta2);
  c.rest1 = static_cast<float>(1 - o.beta1);
  c.rest2 = static_cast<float>(1 - o.beta2);
  c.eps = static_cast<float>(o.eps);
  c.rate = static_cast<float>(lr * correction2 / correction1);
  c.decay = static_cast<float>(1 - lr * o.weight_decay);
  c.skip = o.scalars[kSkip] != 0;
  return c;
}

// The ops, listed once for their declarations and bindings. gram's workspace holds gram_workspace bytes. w null stands for one
// task of weight 1; rows of weight 0 are not read.
#define MINBERT_SURGERY_OPS(OP)                                                                                   \
  OP(int64_t, gram_workspace, (const Where& at, int64_t tasks, int64_t columns))                                  \
  OP(void, gram, (const Where& at, const Matrix& j, void* workspace, float* out, bool accumulate))                \
  OP(void, combine, (const Where& at, const Matrix& j, const float* w, float* out))                               \
  OP(void, adamw, (const Where& at, const Matrix& j, const float* w, const AdamW& to))                            \
  OP(void, pcgrad_weights, (const Where& at, const float* gram, const int32_t* order, int tasks, bool mean,       \
                            float* w, int32_t* nonfinite))                                                        \
  OP(void, clip_scale, (const Where& at, const float* gram, const float* w, int tasks, float max_norm,            \
                        const float* extra, float* scalars, float* norm))
#define MINBERT_DECLARE(result, name, arguments) result name arguments;

MINBERT_SURGERY_OPS(MINBERT_DECLARE)
#ifdef MINBERT_HAS_CUDA
namespace cuda {
MINBERT_SURGERY_OPS(MINBERT_DECLARE)
}
#endif

}  // namespace minbert
