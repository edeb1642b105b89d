// SPDX-License-Identifier: Apache-2.0
// One vector register of floats, for the few loops that manage registers by hand. GCC's and Clang's vector types give
// it arithmetic; the rest of the code is plain loops that the compiler vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace minbert {
namespace MINBERT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * sizeof(float))));

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

// Past the caches, for results that nobody reads soon; p is aligned to the register.
inline void store_streaming(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

// The lanes added in a fixed order, in double.
inline double sum(vfloat v) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

}  // namespace MINBERT_ISA
}  // namespace minbert
