// SPDX-License-Identifier: Apache-2.0
// g = w J, J read once.
#include "cuda/combine.cuh"

namespace minbert {
namespace cuda {
namespace {

template <int kTasks, bool kAligned, class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    combine_kernel(const E* j, int tasks, int64_t stride, int64_t columns, const float* w, float* out) {
  constexpr int kStep = 16 / sizeof(E);
  __shared__ float weights[kMaxTasks];
  stage_weights(w, tasks, weights);
  __syncthreads();
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kStep;
  for (int64_t column = first; column < columns; column += int64_t{gridDim.x} * kThreads * kStep) {
    if (column + kStep <= columns) {
      float g[kStep];
      combine_columns<kTasks, kAligned>(j, tasks, stride, weights, column, g);
      store<kAligned>(out + column, g);
    } else {
      for (int64_t c = column; c < columns; ++c) {
        float g[1];
        combine_columns<kTasks, false>(j, tasks, stride, weights, c, g);
        out[c] = g[0];
      }
    }
  }
}

}  // namespace

void combine(const Where& at, const Matrix& j, const float* w, float* out) {
  specialise<4>(j, aligned(out), [&](const auto* data, auto tasks, auto is_aligned) {
    const int blocks = grid_size(at.device, j.columns * sizeof(*data) / 16);
    combine_kernel<tasks.value, is_aligned.value>
        <<<blocks, kThreads, 0, stream(at)>>>(data, static_cast<int>(j.rows), j.stride, j.columns, w, out);
  });
  check(cudaGetLastError(), "combine");
}

}  // namespace cuda
}  // namespace minbert
