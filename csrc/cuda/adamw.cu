// SPDX-License-Identifier: Apache-2.0
// AdamW on g = w J in one pass: g lives in registers only. Dense and by rows are one kernel.
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

constexpr int kStep = 4, kPiece = kStep * kWarp;  // parameters of a thread, and of a warp

// A warp takes a piece of a row at a time.
template <int kTasks, bool kAligned, class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    adamw_kernel(const E* j, int tasks, int64_t stride, int64_t slots, const float* w, unsigned pieces_per_row,
                 unsigned pieces, AdamW to) {
  __shared__ float weights[kMaxTasks];
  __shared__ AdamWCoefficients shared;
  stage_weights(w, tasks, weights);
  if (threadIdx.x == 0) shared = adamw_coefficients(to);
  __syncthreads();
  const AdamWCoefficients a = shared;
  if (a.skip) return;
  const unsigned warps = gridDim.x * (kThreads / kWarp), lane = threadIdx.x % kWarp;
  for (unsigned piece = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp; piece < pieces; piece += warps) {
    const int64_t row = piece / pieces_per_row, begin = row * to.width;
    const int64_t column = int64_t{piece % pieces_per_row} * kPiece + lane * kStep;
    const int64_t slot = to.row_slot ? to.row_slot[row] : 0;
    const bool touched = slot >= 0 && slot < slots;  // a slot that does not exist cannot be reported from here
    if (column + kStep <= to.width) {
      float g[kStep] = {};
      if (touched) combine_columns<kTasks, kAligned>(j, tasks, stride, weights, slot * to.width + column, g);
      update<kAligned>(a, to, begin + column, g);
    } else {
      for (int64_t c = column; c < to.width; ++c) {
        float g[1] = {};
        if (touched) combine_columns<kTasks, false>(j, tasks, stride, weights, slot * to.width + c, g);
        update<false>(a, to, begin + c, g);
      }
    }
  }
}

}  // namespace

void adamw(const Where& at, const Matrix& j, const float* w, const AdamW& to) {
  if (to.count == 0) return;
  const int64_t rows = to.count / to.width, pieces_per_row = (to.width + kPiece - 1) / kPiece;
  const int64_t pieces = rows * pieces_per_row;
  if (pieces >= int64_t{1} << 31) throw std::runtime_error("adamw: too many parameters for one launch");
  const bool all = aligned(to.p) && aligned(to.m) && aligned(to.v) && aligned(to.copy) &&
                   (!to.row_slot || to.width % 8 == 0);
  const int blocks = grid_size(at.device, pieces * kWarp);
  specialise<4>(j, all, [&](const auto* data, auto tasks, auto is_aligned) {
    adamw_kernel<tasks.value, is_aligned.value><<<blocks, kThreads, 0, stream(at)>>>(
        data, static_cast<int>(j.rows), j.stride, j.columns / to.width, w, static_cast<unsigned>(pieces_per_row),
        static_cast<unsigned>(pieces), to);
  });
  check(cudaGetLastError(), "adamw");
}

}  // namespace cuda
}  // namespace minbert
