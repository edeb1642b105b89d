// SPDX-License-Identifier: Apache-2.0
// Kernels with a fault each, and one without: test_runner.py says how each must be found.
#include <algorithm>
#include <map>
#include <string>

namespace {

constexpr unsigned kThreads = 64, kLanes = ~0u;

__global__ void sound(float* x) {
  __shared__ float y[kThreads];
  y[threadIdx.x] = blockIdx.x + threadIdx.x;
  __syncthreads();
  x[threadIdx.x] = y[kThreads - 1 - threadIdx.x] + __shfl_xor_sync(kLanes, y[threadIdx.x], 1);
}

__global__ void missing_barrier(float* x) {
  __shared__ float y[kThreads];
  y[threadIdx.x] = threadIdx.x;
  x[threadIdx.x] = y[kThreads - 1 - threadIdx.x];
}

__global__ void race_of_same_values(float* x) { x[0] = 1; }

__global__ void barrier_of_half_a_block(float*) {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}

__global__ void two_barriers_at_once(float*) {
  if (threadIdx.x < kThreads / 2)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_of_half_a_warp(float* x) {
  if (threadIdx.x % 2) x[threadIdx.x] = __shfl_xor_sync(kLanes, 1.0f, 1);
}

__global__ void shared_memory_read_first(float* x) {
  __shared__ float y[kThreads];
  x[threadIdx.x] = y[threadIdx.x];
}

__global__ void beyond_the_end(float* x) { x[threadIdx.x + 1] = 1; }

__global__ void beyond_shared_memory(float* x) {
  __shared__ float y[kThreads];
  float* other = x ? y : x;  // the compiler does not see how long it is
  other[threadIdx.x + 1] = 1;
}

__global__ void misaligned(float* x) {
  struct alignas(16) Four {
    float value[4];
  };
  if (threadIdx.x == 0) *reinterpret_cast<Four*>(x + 1) = Four{};
}

__global__ void too_much_shared_memory(float* x) {
  __shared__ float y[(48 << 10) / sizeof(float) + 1];
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void __launch_bounds__(kThreads / 2) more_threads_than_bounds(float*) {}

}  // namespace

// Two launches on zeros; what a GPU or a comparison of the results would say, "" if nothing.
extern "C" const char* run(const char* name) {
#define KERNEL(name) {#name, name}
  const std::map<std::string, void (*)(float*)> kernels{
      KERNEL(sound), KERNEL(missing_barrier), KERNEL(race_of_same_values), KERNEL(barrier_of_half_a_block),
      KERNEL(two_barriers_at_once), KERNEL(shuffle_of_half_a_warp), KERNEL(shared_memory_read_first), KERNEL(beyond_the_end),
      KERNEL(beyond_shared_memory), KERNEL(misaligned), KERNEL(too_much_shared_memory), KERNEL(more_threads_than_bounds)};
  const auto kernel = kernels.at(name);
  float* x[2];
  for (float*& result : x) {
    result = new float[kThreads]();
    kernel<<<1, kThreads, 0, nullptr>>>(result);
  }
  if (const cudaError_t status = cudaGetLastError()) return cudaGetErrorString(status);
  return std::equal(x[0], x[0] + kThreads, x[1]) ? "" : "two results";
}

extern "C" const char* launch(unsigned grid, unsigned block) {
  float x[kThreads];
  sound<<<grid, block, 0, nullptr>>>(x);
  return cudaGetLastError() == cudaSuccess ? "" : cudaGetErrorString(1);
}
