// SPDX-License-Identifier: Apache-2.0
// Helpers of all CUDA kernels: the caller's stream, errors as exceptions, 16-byte loads and stores.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "surgery.h"

namespace minbert {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 4;  // resident at once (unless a kernel needs more registers); a grid is one wave
constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline cudaStream_t stream(const Where& at) { return static_cast<cudaStream_t>(at.stream); }

// Blocks for `work` threads' worth of work: enough, and at most one wave of the device.
inline int grid_size(int device, int64_t work, int blocks_per_processor = kBlocksPerProcessor) {
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const int64_t wanted = (work + kThreads - 1) / kThreads, wave = int64_t{processors} * blocks_per_processor;
  return static_cast<int>(wanted < 1 ? 1 : wanted < wave ? wanted : wave);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// launch(tasks), the number of tasks a compile-time constant; 0 for more than kMost.
template <int kMost, class Launch>
void for_tasks(int64_t tasks, const Launch& launch) {
  if (kMost == 0 || tasks == kMost)
    launch(std::integral_constant<int, kMost>());
  else if constexpr (kMost > 0)
    for_tasks<kMost - 1>(tasks, launch);
}

// launch(J's elements by their type, for_tasks' constant, whether all of J's rows and `others` begin on 16 bytes).
template <int kMost, class Launch>
void specialise(const Matrix& j, bool others, const Launch& launch) {
  const auto typed = [&](const auto* data) {
    const bool all = others && aligned(data) && (j.rows == 1 || j.stride * sizeof(*data) % 16 == 0);
    for_tasks<kMost>(j.rows, [&](auto tasks) {
      if (all)
        launch(data, tasks, std::true_type());
      else
        launch(data, tasks, std::false_type());
    });
  };
  if (j.dtype == DType::bf16)
    typed(static_cast<const bfloat16*>(j.data));
  else
    typed(static_cast<const float*>(j.data));
}

using portable::to_float;
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, bfloat16& to) { to = portable::to_bfloat16(x); }

template <class E, int N>
struct alignas(sizeof(E) * N) Pack {
  E value[N];
};

// x [N] = p [N], in accesses of up to 16 bytes when kAligned.
template <bool kAligned, class E, int N>
__device__ inline void load(const E* p, float (&x)[N]) {
  constexpr int kPack = kAligned ? (16 / sizeof(E) < N ? 16 / sizeof(E) : N) : 1;
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    const Pack<E, kPack> pack = *reinterpret_cast<const Pack<E, kPack>*>(p + i);
#pragma unroll
    for (int k = 0; k < kPack; ++k) x[i + k] = to_float(pack.value[k]);
  }
}

// p [N] = x [N], rounded, in accesses of up to 16 bytes when kAligned.
template <bool kAligned, class E, int N>
__device__ inline void store(E* p, const float (&x)[N]) {
  constexpr int kPack = kAligned ? (16 / sizeof(E) < N ? 16 / sizeof(E) : N) : 1;
#pragma unroll
  for (int i = 0; i < N; i += kPack) {
    Pack<E, kPack> pack;
#pragma unroll
    for (int k = 0; k < kPack; ++k) narrow(x[i + k], pack.value[k]);
    *reinterpret_cast<Pack<E, kPack>*>(p + i) = pack;
  }
}

}  // namespace cuda
}  // namespace minbert
