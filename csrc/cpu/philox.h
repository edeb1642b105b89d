// SPDX-License-Identifier: Apache-2.0
// Dropout factors, computed in the forward and again in the backward: the random numbers of kernels/dropout.py.
//
// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), key = seed, counter =
// (column / 4, row, plane, site); the four words of a draw belong to four neighbouring columns.
#pragma once

#include "cpu/simd.h"

namespace minbert {

// Keep or drop as a pure function of (seed, site, plane, row, column).
struct Dropout {
  bool active;
  uint64_t seed;
  uint32_t site;
  uint32_t threshold;  // drop where a draw is below it: p * 2^32
  float scale;         // 1 / (1 - p)
};
namespace MINBERT_ISA {

typedef uint64_t vlong __attribute__((vector_size(kLanes * 4)));

constexpr int kQuads = kLanes / 2;        // draws made at a time, each in the low half of a 64-bit lane
constexpr int kDrawColumns = 4 * kQuads;  // columns they serve

// The product of the low halves of each lane.
inline vlong multiply_low(vlong a, vlong b) {
#if defined(__AVX512F__)
  return (vlong)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vlong)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vlong)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Even lanes serve the first half of the columns, odd lanes the second: interleaving then puts them in order with one
// instruction that stays within 128 bits.
struct Quad {
  static constexpr uint64_t of(int lane) { return static_cast<uint64_t>(lane / 2 + lane % 2 * (kQuads / 2)); }
};
template <int kParity>
struct Interleaved {
  static constexpr int of(int lane) { return lane / 2 * 2 + kParity + lane % 2 * kQuads; }
};

// The draws of one row of one plane.
class DropoutRow {
 public:
  DropoutRow(const Dropout& dropout, uint32_t plane, uint32_t row)
      : dropout_(dropout), plane_(plane), row_(row) {}

  // Writes column i's factor 0 or 1 / (1 - p) to out[i], in whole groups of kDrawColumns.
  void factors(int64_t columns, float* out) const {
    for (int64_t column = 0; column < columns; column += kDrawColumns) {
      vuint low, high;
      draw(static_cast<uint32_t>(column / 4), low, high);
      store(out + column, keep(low));
      store(out + column + kLanes, keep(high));
    }
  }

 private:
  vfloat keep(vuint words) const { return words >= dropout_.threshold ? broadcast(dropout_.scale) : vfloat{}; }

  // The words of kQuads draws in the order of their columns. High halves hold left-overs, which products ignore.
  void draw(uint32_t first, vuint& low, vuint& high) const {
    constexpr uint64_t kRoundA = 0xD2511F53u, kRoundB = 0xCD9E8D57u;
    constexpr uint32_t kKeyA = 0x9E3779B9u, kKeyB = 0xBB67AE85u;
    vlong c0 = make_lanes<vlong, Quad>() + uint64_t{first};
    vlong c1 = vlong{} + uint64_t{row_}, c2 = vlong{} + uint64_t{plane_}, c3 = vlong{} + uint64_t{dropout_.site};
    uint32_t k0 = static_cast<uint32_t>(dropout_.seed), k1 = static_cast<uint32_t>(dropout_.seed >> 32);
    for (int round = 0; round < 7; ++round) {
      const vlong a = multiply_low(c0, vlong{} + kRoundA), b = multiply_low(c2, vlong{} + kRoundB);
      c0 = (b >> 32) ^ c1 ^ uint64_t{k0};
      c2 = (a >> 32) ^ c3 ^ uint64_t{k1};
      c1 = b;
      c3 = a;
      k0 += kKeyA;
      k1 += kKeyB;
    }
    const vlong first_pair = (c0 & 0xffffffffu) | (c1 << 32), second_pair = (c2 & 0xffffffffu) | (c3 << 32);
    low = (vuint)shuffle<Interleaved<0>>(first_pair, second_pair);
    high = (vuint)shuffle<Interleaved<1>>(first_pair, second_pair);
  }

  const Dropout dropout_;
  const uint32_t plane_, row_;
};

}  // namespace MINBERT_ISA
}  // namespace minbert
