// SPDX-License-Identifier: Apache-2.0
// g = w J, and AdamW fed by it in the same pass: the combined gradient lives in registers only.
#include "cuda/launch.cuh"

namespace minbert {
namespace cuda {
namespace {

// x [N] = (w J)[column : column + N], tasks added in their order. kTasks > 0 fixes their number, so that all loads
// leave at once. Rows of weight zero are not read.
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

template <class E, int kTasks, bool kAligned>
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

// One step for the N parameters from `at` on, whose combined gradient is g.
template <bool kAligned, int N>
__device__ inline void update(const AdamWCoefficients& a, const Parameters& to, int64_t at, const float (&g)[N]) {
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

template <class E, int kTasks, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    adamw_kernel(const E* j, int tasks, int64_t stride, const float* w, Parameters to, AdamWOptions options,
                 const float* scalars) {
  constexpr int kStep = 4;
  __shared__ float weights[kMaxTasks];
  __shared__ AdamWCoefficients shared;
  stage_weights(w, tasks, weights);
  if (threadIdx.x == 0) shared = adamw_coefficients(options, scalars);
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

// Parameters [V, width], a warp a row. Row v's gradient is slot row_slot[v] of j [T, slots, width], or zero.
template <class E, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    adamw_rows_kernel(const E* j, int tasks, int64_t stride, int64_t slots, const float* w, const int32_t* row_slot,
                      int64_t width, Parameters to, AdamWOptions options, const float* scalars) {
  constexpr int kStep = kAligned ? 4 : 1;
  __shared__ float weights[kMaxTasks];
  __shared__ AdamWCoefficients shared;
  stage_weights(w, tasks, weights);
  if (threadIdx.x == 0) shared = adamw_coefficients(options, scalars);
  __syncthreads();
  const AdamWCoefficients a = shared;
  if (a.skip) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kWarp), rows = to.count / width;
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; row < rows; row += warps) {
    const int64_t slot = row_slot[row];
    const bool touched = slot >= 0 && slot < slots;  // a slot that does not exist cannot be reported from here
    for (int64_t column = lane * kStep; column < width; column += kWarp * kStep) {
      float g[kStep] = {};
      if (touched) combine_columns<0, kAligned>(j, tasks, stride, weights, slot * width + column, g);
      update<kAligned>(a, to, row * width + column, g);
    }
  }
}

bool parameters_aligned(const Parameters& p) {
  return aligned(p.p) && aligned(p.m) && aligned(p.v) && aligned(p.copy);
}

// Calls launch with the number of tasks as a compile-time constant, 0 for many.
template <class Launch>
void for_tasks(int tasks, const Launch& launch) {
  switch (tasks) {
    case 1: return launch(std::integral_constant<int, 1>());
    case 2: return launch(std::integral_constant<int, 2>());
    case 3: return launch(std::integral_constant<int, 3>());
    case 4: return launch(std::integral_constant<int, 4>());
    default: return launch(std::integral_constant<int, 0>());
  }
}

template <class E>
void combine_of(const Queue& q, const Matrix& j, const float* w, float* out) {
  const E* data = static_cast<const E*>(j.data);
  const int tasks = static_cast<int>(j.rows), blocks = grid_size(q.device, j.columns * sizeof(E) / 16);
  for_tasks(tasks, [&](auto constant) {
    constexpr int kTasks = decltype(constant)::value;
    if (rows_aligned<E>(j) && aligned(out))
      combine_kernel<E, kTasks, true><<<blocks, kThreads, 0, stream(q)>>>(data, tasks, j.stride, j.columns, w, out);
    else
      combine_kernel<E, kTasks, false><<<blocks, kThreads, 0, stream(q)>>>(data, tasks, j.stride, j.columns, w, out);
  });
}

template <class E>
void adamw_of(const Queue& q, const Matrix& j, const float* w, const Parameters& p, const AdamWOptions& o,
              const float* scalars) {
  const E* data = static_cast<const E*>(j.data);
  const int tasks = static_cast<int>(j.rows), blocks = grid_size(q.device, p.count / 4);
  for_tasks(tasks, [&](auto constant) {
    constexpr int kTasks = decltype(constant)::value;
    if (rows_aligned<E>(j) && parameters_aligned(p))
      adamw_kernel<E, kTasks, true><<<blocks, kThreads, 0, stream(q)>>>(data, tasks, j.stride, w, p, o, scalars);
    else
      adamw_kernel<E, kTasks, false><<<blocks, kThreads, 0, stream(q)>>>(data, tasks, j.stride, w, p, o, scalars);
  });
}

template <class E>
void adamw_rows_of(const Queue& q, const Matrix& j, const float* w, const int32_t* row_slot, int64_t width,
                   const Parameters& p, const AdamWOptions& o, const float* scalars) {
  const E* data = static_cast<const E*>(j.data);
  const int tasks = static_cast<int>(j.rows), blocks = grid_size(q.device, p.count / width * kWarp);
  const int64_t slots = j.columns / width;
  if (rows_aligned<E>(j) && parameters_aligned(p) && width % 8 == 0)
    adamw_rows_kernel<E, true><<<blocks, kThreads, 0, stream(q)>>>(data, tasks, j.stride, slots, w, row_slot, width, p,
                                                                   o, scalars);
  else
    adamw_rows_kernel<E, false><<<blocks, kThreads, 0, stream(q)>>>(data, tasks, j.stride, slots, w, row_slot, width, p,
                                                                    o, scalars);
}

}  // namespace

void combine(const Queue& q, const Matrix& j, const float* w, float* out) {
  const OnDevice here(q.device);
  if (j.dtype == DType::bf16)
    combine_of<bfloat16>(q, j, w, out);
  else
    combine_of<float>(q, j, w, out);
  check(cudaGetLastError(), "combine");
}

void adamw(const Queue& q, const Matrix& j, const float* w, const Parameters& p, const AdamWOptions& o,
           const float* scalars) {
  const OnDevice here(q.device);
  if (j.dtype == DType::bf16)
    adamw_of<bfloat16>(q, j, w, p, o, scalars);
  else
    adamw_of<float>(q, j, w, p, o, scalars);
  check(cudaGetLastError(), "adamw");
}

void adamw_rows(const Queue& q, const Matrix& j, const float* w, const int32_t* row_slot, int64_t width,
                const Parameters& p, const AdamWOptions& o, const float* scalars) {
  const OnDevice here(q.device);
  if (j.dtype == DType::bf16)
    adamw_rows_of<bfloat16>(q, j, w, row_slot, width, p, o, scalars);
  else
    adamw_rows_of<float>(q, j, w, row_slot, width, p, o, scalars);
  check(cudaGetLastError(), "adamw, rows");
}

}  // namespace cuda
}  // namespace minbert
