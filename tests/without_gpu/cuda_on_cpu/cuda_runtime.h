// SPDX-License-Identifier: Apache-2.0
// The part of CUDA that csrc/cuda uses, for a C++ compiler: __init__.py says how. runner.cpp holds what is declared here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)  // __init__.py writes gpu::bound instead

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 16 };
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t status);

// A thread waits here until all threads of its block wait in the same line.
void __syncthreads(int line = __builtin_LINE());

namespace gpu {

// Runs kernel(data) for each thread of each block; the order of threads and of blocks is reversed in every other launch.
void run(unsigned grid, unsigned block, bool reversed, void (*kernel)(void*), void* data);
// Fills a shared array with NaN when the first thread of a block gets there, and counts its bytes.
void shared(void* array, std::size_t bytes);
// Checks the number of threads against __launch_bounds__.
void bound(unsigned threads);
// The 8 bytes of lane `lane ^ lanes`, once all lanes of the warp wait in the same line.
std::uint64_t exchange(unsigned mask, std::uint64_t bytes, int lanes, int line);

// kernel<<<grid, block, 0, stream>>>(arguments), with `call` for kernel(arguments): a type of its own for each kernel.
template <class Call>
void launch(unsigned grid, unsigned block, std::size_t, cudaStream_t, Call call) {
  static bool reversed = true;
  reversed = !reversed;
  run(grid, block, reversed, [](void* data) { (*static_cast<Call*>(data))(); }, &call);
}

}  // namespace gpu

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bytes = 0;
  std::memcpy(&bytes, &value, sizeof value);
  bytes = gpu::exchange(mask, bytes, lanes, line);
  std::memcpy(&value, &bytes, sizeof value);
  return value;
}
