// SPDX-License-Identifier: Apache-2.0
// Small matrix products and transposes on floats in the first- and second-level caches.
#pragma once

#include "cpu/simd.h"

namespace minbert {
namespace MINBERT_ISA {

// Element (i, k) of the left operand is data[i * row + k * column]: a matrix or its transpose.
struct Left {
  const float* data;
  int64_t row, column;
};

// A matrix whose rows begin `pitch` words apart, a multiple of kLanes.
struct Words {
  float* data;
  int64_t pitch;

  float* row(int64_t i) const { return data + i * pitch; }
  bfloat16* halves(int64_t i) const { return reinterpret_cast<bfloat16*>(row(i)); }
};

// How operands are held and multiplied: words of one float each ...
struct Singles {
  static int64_t words(int64_t depth) { return depth; }
  static vfloat add_product(vfloat sum, vfloat a, vfloat b) { return sum + a * b; }

  // Row i of `to` = row [width], zeros up to the pitch.
  template <class T>
  static void copy_row(const T* row, int64_t width, Words to, int64_t i) {
    for_columns(width, [&](int64_t k, auto lanes, int) { store(to.row(i) + k, load(row + k, lanes)); });
  }
  // A row of results becomes a row of a left operand, in place.
  static void pack_row(float*, int64_t) {}
  // Rows as the right operand of a product along them (or, read by columns, the left one).
  static Words stack(Words rows, int64_t, int64_t, Words) { return rows; }
};

#if defined(__AVX512BF16__)
// ... or words of two neighbours along the depth in bf16, which one instruction multiplies and adds.
struct Pairs {
  static int64_t words(int64_t depth) { return (depth + 1) / 2; }
  static vfloat add_product(vfloat sum, vfloat a, vfloat b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static void copy_row(const bfloat16* row, int64_t width, Words to, int64_t i) {
    bfloat16* copy = to.halves(i);
    int64_t k = 0;
    for (; k + 2 * kLanes <= width; k += 2 * kLanes) std::memcpy(copy + k, row + k, 2 * kLanes * sizeof(bfloat16));
    if (k == 2 * to.pitch) return;
    bfloat16 rest[2 * kLanes] = {};
    std::memcpy(rest, row + k, static_cast<size_t>(width - k) * sizeof(bfloat16));
    std::memcpy(copy + k, rest, sizeof rest);
  }
  static void pack_row(float* row, int64_t columns) {
    for (int64_t i = 0; i < columns; i += kLanes) store(reinterpret_cast<bfloat16*>(row) + i, load(row + i), All{});
  }
  // Word (i, j) of the result holds elements (2 i, j) and (2 i + 1, j); behind an odd last row stand zeros.
  static Words stack(Words rows, int64_t count, int64_t columns, Words to) {
    for (int64_t i = 0; i < count; i += 2)
      for (int64_t j = 0; j < columns; j += kLanes) {
        const vuint low = halves(rows.halves(i) + j), high = i + 1 < count ? halves(rows.halves(i + 1) + j) : vuint{};
        store(to.row(i / 2) + j, (vfloat)(low | high << 16));
      }
    return to;
  }

 private:
  static vuint halves(const bfloat16* p) {
    vshort bits;
    std::memcpy(&bits, p, sizeof bits);
    return widen(bits);
  }
};
#endif

// The kind of product for activations of type T.
template <class T>
struct ProductOf {
  using Kind = Singles;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<bfloat16> {
  using Kind = Pairs;
};
#endif

constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;
constexpr int kMostRows = 12, kMostVectors = 4;
constexpr int tile_rows(int vectors) { return kAccumulators / vectors < kMostRows ? kAccumulators / vectors : kMostRows; }

// R rows by V registers of c = (or +=) a b over `depth`, the sums in registers.
template <class Kind, int R, int V>
inline void product_tile(Left a, const float* b, int64_t b_pitch, float* c, int64_t c_pitch, int64_t depth, bool add) {
  vfloat sums[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = add ? load(c + r * c_pitch + v * kLanes) : vfloat{};
  // Rows in threes, so that few address registers reach all of them.
  constexpr int kGroups = (R + 2) / 3;
  const float* rows[kGroups];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) rows[g] = a.data + 3 * g * a.row;
  for (int64_t k = 0; k < depth; ++k) {
    vfloat right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vfloat left = broadcast(rows[r / 3][r % 3 * a.row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = Kind::add_product(sums[r][v], left, right[v]);
    }
    b += b_pitch;
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) rows[g] += a.column;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * c_pitch + v * kLanes, sums[r][v]);
}

// The last rows, fewer than R.
template <class Kind, int R, int V>
inline void product_rest(int64_t rows, Left a, const float* b, int64_t b_pitch, float* c, int64_t c_pitch, int64_t depth,
                         bool add) {
  if constexpr (R > 0) {
    if (rows == R) return product_tile<Kind, R, V>(a, b, b_pitch, c, c_pitch, depth, add);
    product_rest<Kind, R - 1, V>(rows, a, b, b_pitch, c, c_pitch, depth, add);
  }
}

template <class Kind, int V>
void product_columns(int64_t rows, Left a, const float* b, int64_t b_pitch, float* c, int64_t c_pitch, int64_t depth,
                     bool add) {
  constexpr int R = tile_rows(V);
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    product_tile<Kind, R, V>({a.data + i * a.row, a.row, a.column}, b, b_pitch, c + i * c_pitch, c_pitch, depth, add);
  product_rest<Kind, R - 1, V>(rows - i, {a.data + i * a.row, a.row, a.column}, b, b_pitch, c + i * c_pitch, c_pitch, depth,
                         add);
}

// c [rows, columns] = (or +=) a [rows, depth] b [depth, columns]: c in floats, depth in words, columns a multiple of kLanes.
template <class Kind>
void product(int64_t rows, int64_t columns, int64_t depth, Left a, Words b, Words c, bool add = false) {
  int64_t left = columns / kLanes;
  for (int64_t column = 0; left > 0;) {
    const int64_t strips = (left + kMostVectors - 1) / kMostVectors, vectors = (left + strips - 1) / strips;
    const float* from = b.data + column;
    float* to = c.data + column;
    switch (vectors) {
      case 1: product_columns<Kind, 1>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
      case 2: product_columns<Kind, 2>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
      case 3: product_columns<Kind, 3>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
      default: product_columns<Kind, 4>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
    }
    left -= vectors;
    column += vectors * kLanes;
  }
}

template <int kOffset>
struct Zipped {
  static constexpr int of(int lane) { return lane / 2 + lane % 2 * kLanes + kOffset; }
};

// Transposes a square of registers by interleaving halves log2(kLanes) times.
inline void transpose_square(vfloat (&square)[kLanes]) {
#pragma GCC unroll 4
  for (int width = 1; width < kLanes; width *= 2) {
    vfloat next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      const vfloat a = square[i], b = square[i + kLanes / 2];
      next[2 * i] = shuffle<Zipped<0>>(a, b);
      next[2 * i + 1] = shuffle<Zipped<kLanes / 2>>(a, b);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
}

}  // namespace MINBERT_ISA
}  // namespace minbert
