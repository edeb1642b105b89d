// SPDX-License-Identifier: Apache-2.0
// AdamW on g = w J in one pass: g lives in registers only.
#include "cuda/combine.cuh"

namespace minbert {
namespace cuda {
namespace {

// One step for the N parameters from `at` on, whose combined gradient is g.
template <bool kAligned, int N>
__device__ inline void update(const AdamWCoefficients& a, const AdamW& to, int64_t at, const float (&g)[N]) {
  float p[N], m[N], v[N];
  load<kAligned>(to.p + at, p);
  load<kAligned>(to.m + at, m);
  load<kAligned>(to.v + at, v);
#pragma unroll
  for (int n = 0; n < N; ++n) a.update(g[n], p[n], m[n], v[n]);
  store<kAligned>(to.p + at, p);
  store<kAligned>(to.m + at, m);
  store<kAligned>(to.v + at, v);
  if (to.copy) store<kAligned>(to.copy + at, p);
}

template <int kTasks, bool kAligned, class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    adamw_kernel(const E* j, int tasks, int64_t stride, const float* w, AdamW to) {
  constexpr int kStep = 4;
  __shared__ float weights[kMaxTasks];
  __shared__ AdamWCoefficients shared;
  stage_weights(w, tasks, weights);
  if (threadIdx.x == 0) shared = adamw_coefficients(to);
  __syncthreads();
  const AdamWCoefficients a = shared;
  if (a.skip) return;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kStep;
  for (int64_t column = first; column < to.count; column += int64_t{gridDim.x} * kThreads * kStep) {
    if (column + kStep <= to.count) {
      float g[kStep];
      combine_columns<kTasks, kAligned>(j, tasks, stride, weights, column, g);
      update<kAligned>(a, to, column, g);
    } else {
      for (int64_t c = column; c < to.count; ++c) {
        float g[1];
        combine_columns<kTasks, false>(j, tasks, stride, weights, c, g);
        update<false>(a, to, c, g);
      }
    }
  }
}

// Rows of `width` parameters, a warp a row.
template <int kTasks, bool kAligned, class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    adamw_rows_kernel(const E* j, int tasks, int64_t stride, int64_t slots, const float* w, AdamW to) {
  constexpr int kStep = kAligned ? 4 : 1;
  __shared__ float weights[kMaxTasks];
  __shared__ AdamWCoefficients shared;
  stage_weights(w, tasks, weights);
  if (threadIdx.x == 0) shared = adamw_coefficients(to);
  __syncthreads();
  const AdamWCoefficients a = shared;
  if (a.skip) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp), width = to.width, rows = to.count / width;
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; row < rows; row += warps) {
    const int64_t slot = to.row_slot[row];
    const bool touched = slot >= 0 && slot < slots;  // a slot that does not exist cannot be reported from here
    for (int64_t column = lane * kStep; column < width; column += kWarp * kStep) {
      float g[kStep] = {};
      if (touched) combine_columns<kTasks, kAligned>(j, tasks, stride, weights, slot * width + column, g);
      update<kAligned>(a, to, row * width + column, g);
    }
  }
}

}  // namespace

void adamw(const Where& at, const Matrix& j, const float* w, const AdamW& to) {
  if (to.count == 0) return;
  const OnDevice here(at.device);
  const bool all = aligned(to.p) && aligned(to.m) && aligned(to.v) && aligned(to.copy) && (!to.row_slot || to.width % 8 == 0);
  const int64_t rows = to.count / to.width, slots = j.columns / to.width;
  const int blocks = grid_size(at.device, to.row_slot ? rows * kWarp : to.count / 4);
  specialise<4>(j, all, [&](const auto* data, auto constant, auto is_aligned) {
    const int tasks = static_cast<int>(j.rows);
    if (to.row_slot)
      adamw_rows_kernel<constant.value, is_aligned.value>
          <<<blocks, kThreads, 0, stream(at)>>>(data, tasks, j.stride, slots, w, to);
    else
      adamw_kernel<constant.value, is_aligned.value><<<blocks, kThreads, 0, stream(at)>>>(data, tasks, j.stride, w, to);
  });
  check(cudaGetLastError(), "adamw");
}

}  // namespace cuda
}  // namespace minbert
