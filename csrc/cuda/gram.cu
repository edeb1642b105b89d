// SPDX-License-Identifier: Apache-2.0
// G = J J^T in two stages, without atomics: each block sums its own columns into a row of partial sums, then one warp
// an entry adds the rows in a fixed order. J is read once.
//
//   up to 8 tasks    a thread keeps all T (T + 1) / 2 sums in registers and reads 16 bytes of each row at a time
//   up to 64 tasks   a block stages 64 columns of all rows in shared memory; a thread keeps a 4 x 4 tile of sums
#include "cuda/launch.cuh"

namespace minbert {
namespace cuda {
namespace {

constexpr int kSmallTasks = 8;

// Many sums need more registers than four resident blocks leave a thread.
__host__ __device__ constexpr int blocks_per_processor(int tasks) { return tasks <= 4 ? kBlocksPerProcessor : 2; }

__host__ __device__ constexpr int pair_count(int tasks) { return tasks * (tasks + 1) / 2; }

// Adds sums [N] over the block and writes them to partial [N].
template <int N>
__device__ void write_block_sums(float (&sums)[N], float* partial) {
  __shared__ float warps[kThreads / kWarp][N];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int offset = kWarp / 2; offset; offset /= 2) sums[n] += __shfl_xor_sync(kAllLanes, sums[n], offset);
    if (lane == 0) warps[warp][n] = sums[n];
  }
  __syncthreads();
  if (threadIdx.x < N) {
    float total = 0;
    for (int w = 0; w < kThreads / static_cast<int>(kWarp); ++w) total += warps[w][threadIdx.x];
    partial[threadIdx.x] = total;
  }
}

// partials [blocks, T (T + 1) / 2]
template <int T, bool kAligned, class E>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(T))
    gram_small(const E* j, int64_t stride, int64_t columns, float* partials) {
  constexpr int kStep = T <= 3 ? 16 / sizeof(E) : 4;  // columns a thread takes at a time
  float sums[pair_count(T)] = {};
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kStep;
  for (int64_t column = first; column < columns; column += int64_t{gridDim.x} * kThreads * kStep) {
    float x[T][kStep];
    if (column + kStep <= columns) {
#pragma unroll
      for (int t = 0; t < T; ++t) load<kAligned>(j + t * stride + column, x[t]);
    } else {
#pragma unroll
      for (int t = 0; t < T; ++t)
#pragma unroll
        for (int k = 0; k < kStep; ++k) x[t][k] = column + k < columns ? to_float(j[t * stride + column + k]) : 0;
    }
    int pair = 0;
#pragma unroll
    for (int a = 0; a < T; ++a)
#pragma unroll
      for (int b = a; b < T; ++b, ++pair)
#pragma unroll
        for (int k = 0; k < kStep; ++k) sums[pair] = fmaf(x[a][k], x[b][k], sums[pair]);
  }
  write_block_sums(sums, partials + int64_t{blockIdx.x} * pair_count(T));
}

// T is the number of tasks rounded up to 16, 32 or 64. Threads form (T/4)^2 tiles in kGroups groups, and a group takes
// every kGroups-th column. Sums move to double every 1,024 columns.
template <int T, bool kAligned, class E>
__global__ void __launch_bounds__(kThreads, blocks_per_processor(T))
    gram_large(const E* j, int tasks, int64_t stride, int64_t columns, float* partials) {
  constexpr int kColumns = 64, kTiles = T / 4, kGroups = kThreads / (kTiles * kTiles), kFlush = 1024 / kColumns;
  constexpr int kStep = 16 / sizeof(E), kSteps = kColumns / kStep;
  constexpr int kStage = kColumns * (T + 4);
  __shared__ alignas(16) float shared[kStage > kGroups * T * T ? kStage : kGroups * T * T];
  float(*stage)[T + 4] = reinterpret_cast<float(*)[T + 4]>(shared);  // [column][task]

  const int group = threadIdx.x / (kTiles * kTiles), tile = threadIdx.x % (kTiles * kTiles);
  const int a = tile / kTiles * 4, b = tile % kTiles * 4;
  float sums[4][4] = {};
  double totals[4][4] = {};
  for (int i = threadIdx.x; i < kStage; i += kThreads) shared[i] = 0;

  int staged = 0;
  for (int64_t first = int64_t{blockIdx.x} * kColumns; first < columns; first += int64_t{gridDim.x} * kColumns) {
    __syncthreads();
    for (int i = threadIdx.x; i < tasks * kSteps; i += kThreads) {
      const int task = i / kSteps, within = i % kSteps * kStep;
      const int64_t column = first + within;
      const E* source = j + task * stride + column;
      float x[kStep];
      if (column + kStep <= columns) {
        load<kAligned>(source, x);
      } else {
#pragma unroll
        for (int k = 0; k < kStep; ++k) x[k] = column + k < columns ? to_float(source[k]) : 0;
      }
#pragma unroll
      for (int k = 0; k < kStep; ++k) stage[within + k][task] = x[k];
    }
    __syncthreads();
#pragma unroll 4
    for (int column = group; column < kColumns; column += kGroups) {
      float x[4], y[4];
      load<true>(&stage[column][a], x);
      load<true>(&stage[column][b], y);
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int s = 0; s < 4; ++s) sums[r][s] = fmaf(x[r], y[s], sums[r][s]);
    }
    if (++staged % kFlush == 0) {
#pragma unroll
      for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int s = 0; s < 4; ++s) totals[r][s] += sums[r][s], sums[r][s] = 0;
    }
  }

  __syncthreads();
  float* sheet = shared + group * T * T;  // [T][T], this group's sums
  for (int r = 0; r < 4; ++r)
    for (int s = 0; s < 4; ++s) sheet[(a + r) * T + b + s] = static_cast<float>(totals[r][s] + sums[r][s]);
  __syncthreads();
  float* partial = partials + int64_t{blockIdx.x} * pair_count(tasks);
  for (int i = threadIdx.x; i < T * T; i += kThreads) {
    const int row = i / T, column = i % T;
    if (row > column || column >= tasks) continue;
    float total = 0;
    for (int g = 0; g < kGroups; ++g) total += shared[g * T * T + i];
    partial[row * (2 * tasks - row - 1) / 2 + column] = total;
  }
}

// One warp an entry: its lanes walk down the blocks' partial sums, and both halves of G are written.
__global__ void __launch_bounds__(kThreads)
    gram_finish(const float* partials, int blocks, int tasks, float* out, bool accumulate) {
  const int pairs = pair_count(tasks);
  const int pair = static_cast<int>((blockIdx.x * kThreads + threadIdx.x) / kWarp), lane = threadIdx.x % kWarp;
  if (pair >= pairs) return;
  double total = 0;
  for (int block = lane; block < blocks; block += kWarp) total += partials[int64_t{block} * pairs + pair];
#pragma unroll
  for (int offset = kWarp / 2; offset; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
  int row = 0, rest = pair;
  while (rest >= tasks - row) rest -= tasks - row++;
  const int column = row + rest;
  if (lane == 0) {
    const float before = accumulate ? out[row * tasks + column] : 0;
    out[row * tasks + column] = out[column * tasks + row] = static_cast<float>(before + total);
  }
}

int first_stage_blocks(const Where& at, int64_t tasks, int64_t columns) {
  const int64_t work = tasks <= kSmallTasks ? columns / 4 : columns * 4;
  return grid_size(at.device, work, blocks_per_processor(static_cast<int>(tasks)));
}

}  // namespace

int64_t gram_workspace(const Where& at, int64_t tasks, int64_t columns) {
  return first_stage_blocks(at, tasks, columns) * (tasks * (tasks + 1) / 2) * static_cast<int64_t>(sizeof(float));
}

void gram(const Where& at, const Matrix& j, void* workspace, float* out, bool accumulate) {
  const int tasks = static_cast<int>(j.rows), blocks = first_stage_blocks(at, tasks, j.columns);
  float* partials = static_cast<float*>(workspace);
  const cudaStream_t s = stream(at);
  specialise<kSmallTasks>(j, true, [&](const auto* data, auto constant, auto is_aligned) {
    constexpr int kTasks = constant.value;
    constexpr bool kAligned = is_aligned.value;
    if constexpr (kTasks > 0)
      gram_small<kTasks, kAligned><<<blocks, kThreads, 0, s>>>(data, j.stride, j.columns, partials);
    else if (tasks <= 16)
      gram_large<16, kAligned><<<blocks, kThreads, 0, s>>>(data, tasks, j.stride, j.columns, partials);
    else if (tasks <= 32)
      gram_large<32, kAligned><<<blocks, kThreads, 0, s>>>(data, tasks, j.stride, j.columns, partials);
    else
      gram_large<64, kAligned><<<blocks, kThreads, 0, s>>>(data, tasks, j.stride, j.columns, partials);
  });
  check(cudaGetLastError(), "gram, first stage");
  const int warps_per_block = kThreads / static_cast<int>(kWarp);
  const int finish = (pair_count(tasks) + warps_per_block - 1) / warps_per_block;
  gram_finish<<<finish, kThreads, 0, s>>>(partials, blocks, tasks, out, accumulate);
  check(cudaGetLastError(), "gram, second stage");
}

}  // namespace cuda
}  // namespace minbert
