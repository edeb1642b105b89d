// SPDX-License-Identifier: Apache-2.0
// Element types, and conversions that compilers turn into vector instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace minbert {

// Element types of tensors. The codes of the first two are those that minbert_fast/ops/native/tensors.py passes.
enum class DType : int { f32 = 0, bf16 = 1, i32, i64, boolean, other };

struct bfloat16 {
  uint16_t bits;
};

namespace MINBERT_ISA {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

// dst[i] = float(src[i]) for n elements, and back.
template <class T>
inline void to_floats(const T* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
}

template <class T>
inline void from_floats(const float* src, T* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = from_float<T>(src[i]);
}

}  // namespace MINBERT_ISA
}  // namespace minbert
