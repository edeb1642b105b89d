// SPDX-License-Identifier: Apache-2.0
// What gradient surgery works on, the same on the CPU and on a GPU. T tasks, P parameters, J [T, P] their gradients.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__CUDACC__)
#define MINBERT_HD __host__ __device__
#else
#define MINBERT_HD
#endif

namespace minbert {

constexpr int kMaxTasks = 64;

// J: `rows` gradients of `columns` elements, fp32 or bf16, `stride` elements from one row to the next.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t rows, columns, stride;
};

// A flat block of parameters and Adam's moments, all fp32; `copy` is its bf16 image, or null.
struct Parameters {
  float *p, *m, *v;
  bfloat16* copy;
  int64_t count;
};

struct AdamWOptions {
  double lr_factor, beta1, beta2, eps, weight_decay;
  bool correct_bias;
  bool torch_style;  // torch.optim.AdamW: decay first, eps after the bias correction. Else the course's AdamW
};

// Where the step's own numbers lie in the `scalars` tensor, so that a captured graph follows a schedule.
enum Scalar { kLearningRate = 0, kStep = 1, kGradientScale = 2, kSkip = 3, kScalars = 4 };

// Both kinds of AdamW in one formula: p = after * (before * p - rate * m / (root * sqrt(v) + eps)).
//   course: rate = lr * sqrt(1 - beta2^t) / (1 - beta1^t), root = 1, decay after the update
//   torch:  rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t), decay before it
struct AdamWCoefficients {
  float scale, beta1, beta2, rest1, rest2, eps, rate, root, before, after;
  bool skip;

  MINBERT_HD void update(float gradient, float& p, float& m, float& v) const {
    const float g = scale * gradient;
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * g * g;
    p = after * (before * p - rate * m / (root * sqrtf(v) + eps));
  }
};

MINBERT_HD inline AdamWCoefficients adamw_coefficients(const AdamWOptions& o, const float* scalars) {
  const double lr = scalars[kLearningRate] * o.lr_factor, step = scalars[kStep];
  const double correction1 = o.correct_bias ? 1 - pow(o.beta1, step) : 1;
  const double correction2 = o.correct_bias ? sqrt(1 - pow(o.beta2, step)) : 1;
  const double decay = 1 - lr * o.weight_decay;
  AdamWCoefficients c;
  c.scale = scalars[kGradientScale];
  c.beta1 = static_cast<float>(o.beta1);
  c.beta2 = static_cast<float>(o.beta2);
  c.rest1 = static_cast<float>(1 - o.beta1);
  c.rest2 = static_cast<float>(1 - o.beta2);
  c.eps = static_cast<float>(o.eps);
  c.rate = static_cast<float>(o.torch_style ? lr / correction1 : lr * correction2 / correction1);
  c.root = static_cast<float>(o.torch_style ? 1 / correction2 : 1);
  c.before = static_cast<float>(o.torch_style ? decay : 1);
  c.after = static_cast<float>(o.torch_style ? 1 : decay);
  c.skip = scalars[kSkip] != 0;
  return c;
}

// On the CPU. `threads` bounds the threads used; no result depends on it.
void gram(const Matrix& j, float* out, bool accumulate, int threads);
void combine(const Matrix& j, const float* w, float* out, int threads);
void adamw(const Matrix& j, const float* w, const Parameters& p, const AdamWOptions& o, const float* scalars, int threads);
// Parameters [V, H] of which few rows have a gradient: j [T, U * H], row v's is slot row_slot[v], -1 for none.
void adamw_rows(const Matrix& j, const float* w, const int32_t* row_slot, int64_t width, const Parameters& p,
                const AdamWOptions& o, const float* scalars, int threads);
void pcgrad_weights(const float* gram, const int32_t* order, int tasks, bool mean, float* w, int32_t* nonfinite);
void clip_scale(const float* gram, const float* w, int tasks, const float* extra, float max_norm, float* scalars,
                float* norm);

#ifdef MINBERT_HAS_CUDA
// The same on a GPU. All is queued on `stream` and none of it waits; a launch that fails throws std::runtime_error.
namespace cuda {

struct Queue {
  int device;
  void* stream;  // cudaStream_t
};

int64_t gram_workspace(int device, int64_t tasks, int64_t columns);  // floats that gram needs
void gram(const Queue& q, const Matrix& j, float* workspace, float* out, bool accumulate);
void combine(const Queue& q, const Matrix& j, const float* w, float* out);
void adamw(const Queue& q, const Matrix& j, const float* w, const Parameters& p, const AdamWOptions& o,
           const float* scalars);
void adamw_rows(const Queue& q, const Matrix& j, const float* w, const int32_t* row_slot, int64_t width,
                const Parameters& p, const AdamWOptions& o, const float* scalars);
void pcgrad_weights(const Queue& q, const float* gram, const int32_t* order, int tasks, bool mean, float* w,
                    int32_t* nonfinite);
void clip_scale(const Queue& q, const float* gram, const float* w, int tasks, const float* extra, float max_norm,
                float* scalars, float* norm);

}  // namespace cuda
#endif

}  // namespace minbert
