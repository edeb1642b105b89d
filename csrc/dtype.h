// SPDX-License-Identifier: Apache-2.0
// Element types, and conversions that compilers turn into vector instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__CUDACC__)
#define MINBERT_HD __host__ __device__
#else
#define MINBERT_HD
#endif

namespace minbert {

// Element types of tensors. minbert_fast/ops/native/surgery.py passes the codes of the first two.
enum class DType : int { f32 = 0, bf16 = 1, i32, i64, boolean, other };

struct bfloat16 {
  uint16_t bits;
};

namespace MINBERT_ISA {

MINBERT_HD inline float to_float(float x) { return x; }
MINBERT_HD inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even; NaN stays a (quiet) NaN.
MINBERT_HD inline bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

}  // namespace MINBERT_ISA
}  // namespace minbert
