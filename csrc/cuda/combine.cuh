// SPDX-License-Identifier: Apache-2.0
// g = w J in registers, for combine and adamw. setup.py compiles without contraction (-fmad=false), so that both, and
// every variant of each, round alike.
#pragma once

#include "cuda/launch.cuh"

namespace minbert {
namespace cuda {

// x [N] = (w J)[column : column + N], tasks added in their order. kTasks > 0 fixes their number, so that all loads
// are issued at once. Rows of weight zero are not read.
template <int kTasks, bool kAligned, class E, int N>
__device__ inline void combine_columns(const E* j, int tasks, int64_t stride, const float* w, int64_t column,
                                       float (&x)[N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = 0;
  const int count = kTasks ? kTasks : tasks;
#pragma unroll
  for (int t = 0; t < count; ++t) {
    const float weight = w[t];
    float row[N] = {};
    if (weight != 0) load<kAligned>(j + t * stride + column, row);
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] += weight * row[n];
  }
}

// The weights of all tasks, in shared memory; w null stands for one task of weight 1.
__device__ inline void stage_weights(const float* w, int tasks, float* weights) {
  for (int t = threadIdx.x; t < tasks; t += kThreads) weights[t] = w ? w[t] : 1.0f;
}

}  // namespace cuda
}  // namespace minbert
