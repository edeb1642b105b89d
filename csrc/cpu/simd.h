// SPDX-License-Identifier: Apache-2.0
// Rows of any length and element type, one register of floats at a time.
//
// for_columns(n, body) calls body(i, lanes, slot): `lanes` is All, or Some for what is left at the end, and `load` and
// `store` take it. Loads fill absent lanes with zeros. `slot` (0 to 3) differs between neighbouring
// calls, so that a sum in four parts does not wait for the addition before it.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "dtype.h"

#if defined(__SSE2__)
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

// One register. GCC's and Clang's vector types have arithmetic; most loops are plain ones that the compiler vectorises.
typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

constexpr int64_t kSlots = 4;

struct All {};
struct Some {
  int count;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline vfloat load(const float* p, All = {}) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vfloat v, All = {}) { std::memcpy(p, &v, sizeof v); }

// Writes past the caches, for results that nobody reads soon; p is aligned to the register.
inline void store_streaming(float* p, vfloat v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}

// The compiler's generic conversions between widths work by halves, so these name the instructions.
inline vuint widen(vshort v) {
#if defined(__AVX512F__)
  return (vuint)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (vuint)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vuint);
#endif
}
inline vshort narrow(vuint v) {
#if defined(__AVX512F__)
  return (vshort)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, vshort);
#endif
}

inline vfloat load(const bfloat16* p, All) {
  vshort bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vfloat)(widen(bits) << 16);
}

inline void store(bfloat16* p, vfloat v, All) {
#if defined(__AVX512BF16__)
  const __m256bh bits = _mm512_cvtneps_pbh((__m512)v);
#else
  // Round to nearest, ties to even; NaN stays a (quiet) NaN.
  const vuint u = (vuint)v;
  const vuint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vshort bits = narrow(v == v ? rounded : (u >> 16) | 0x40u);
#endif
  std::memcpy(p, &bits, sizeof bits);
}

// The last lanes of a row go through a whole register on the stack.
template <class T>
inline vfloat load(const T* p, Some some) {
  T whole[kLanes] = {};
  std::memcpy(whole, p, static_cast<size_t>(some.count) * sizeof(T));
  return load(whole, All{});
}

template <class T>
inline void store(T* p, vfloat v, Some some) {
  T whole[kLanes];
  store(whole, v, All{});
  std::memcpy(p, whole, static_cast<size_t>(some.count) * sizeof(T));
}

// body(T{}) for the activations' element type T.
template <class Body>
inline void with_element(DType dtype, const Body& body) {
  if (dtype == DType::bf16)
    body(bfloat16{});
  else
    body(float{});
}

// The vector of Of::of(lane): a compile-time constant, where a loop would depend on the optimiser.
template <class V, class Of, int... Lane>
constexpr V make_lanes(std::integer_sequence<int, Lane...>) {
  return V{Of::of(Lane)...};
}
template <class V, class Of>
constexpr V make_lanes() {
  return make_lanes<V, Of>(std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>{});
}

template <int... Lane>
inline vfloat broadcast(float x, std::integer_sequence<int, Lane...>) {
  return vfloat{((void)Lane, x)...};
}
inline vfloat broadcast(float x) { return broadcast(x, std::make_integer_sequence<int, kLanes>{}); }

// The lanes Of::of(lane) of a and b; b's count on from a's.
template <class Of, class V, int... Lane>
inline V shuffle(V a, V b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Of::of(Lane)...);
#else
  return __builtin_shuffle(a, b, make_lanes<decltype(a == b), Of>());
#endif
}
template <class Of, class V>
inline V shuffle(V a, V b) {
  return shuffle<Of>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(V{}[0])>{});
}

struct LaneNumber {
  static constexpr int of(int lane) { return lane; }
};
constexpr vint kLaneNumbers = make_lanes<vint, LaneNumber>();

// v where there is a lane, `otherwise` beyond the end.
inline vfloat keep_lanes(vfloat v, All, float) { return v; }
inline vfloat keep_lanes(vfloat v, Some some, float otherwise) {
  return kLaneNumbers < some.count ? v : broadcast(otherwise);
}

// b where either is NaN.
inline vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline vfloat smaller(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

template <int kHalf>
struct HalvesSwapped {
  static constexpr int of(int lane) { return lane ^ kHalf; }
};

// Combines all lanes by halves, always in the same order.
template <int kHalf, class Add>
inline float fold_lanes(vfloat v, const Add& add) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    return fold_lanes<kHalf / 2>(add(v, shuffle<HalvesSwapped<kHalf>>(v, v)), add);
  }
}
inline float add_lanes(vfloat v) {
  return fold_lanes<kLanes / 2>(v, [](vfloat a, vfloat b) { return a + b; });
}
inline float largest_lane(vfloat v) { return fold_lanes<kLanes / 2>(v, larger); }

// The lanes added in their order, in double.
inline double sum(vfloat v) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// A sum over columns in four parts.
struct Sum {
  vfloat parts[kSlots] = {};
  void add(int slot, vfloat v) { parts[slot] += v; }
  float total() const { return add_lanes((parts[0] + parts[1]) + (parts[2] + parts[3])); }
};

template <class Body>
inline __attribute__((always_inline)) void for_columns(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kSlots * kLanes <= n; i += kSlots * kLanes) {
    body(i, All{}, 0);
    body(i + kLanes, All{}, 1);
    body(i + 2 * kLanes, All{}, 2);
    body(i + 3 * kLanes, All{}, 3);
  }
  for (; i + kLanes <= n; i += kLanes) body(i, All{}, 0);
  if (i < n) body(i, Some{static_cast<int>(n - i)}, 0);
}

// c0 + x (c1 + x (c2 + ...)).
inline vfloat polynomial(vfloat, float c) { return broadcast(c); }
template <class... Rest>
inline vfloat polynomial(vfloat x, float c, Rest... rest) {
  return polynomial(x, rest...) * x + c;
}

// 2^t for t <= 0 (and a little above), to one unit in the last place; 2^-125 for t below -125, NaN for NaN.
inline vfloat exp2(vfloat t) {
  t = larger(broadcast(-125.0f), t);
  const vfloat shifted = t + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are t, rounded
  const vfloat f = t - (shifted - 12582912.0f);
  // Interpolation of 2^f at the Chebyshev nodes of [-1/2, 1/2].
  const vfloat power = polynomial(f, 1.0f, 6.931472067028329e-1f, 2.4022650922289554e-1f, 5.550327226669895e-2f,
                                  9.61805667843204e-3f, 1.3400428177711937e-3f, 1.5461444724808513e-4f);
  return (vfloat)((vint)power + ((vint)shifted << 23));
}

}  // namespace MINBERT_ISA
}  // namespace minbert
