// SPDX-License-Identifier: Apache-2.0
// Small matrix products and transposes on floats that lie in the nearer caches.
#pragma once

#include "cpu/simd.h"

namespace minbert {
namespace MINBERT_ISA {

// Element (i, k) of the left operand is data[i * row + k * column]: a matrix or its transpose.
struct Left {
  const float* data;
  int64_t row, column;
};

// A matrix whose rows begin `pitch` floats apart, a multiple of kLanes.
struct Matrix32 {
  float* data;
  int64_t pitch;

  float* row(int64_t i) const { return data + i * pitch; }
};

constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;
constexpr int kMostRows = 12, kMostVectors = 4;
constexpr int tile_rows(int vectors) { return kAccumulators / vectors < kMostRows ? kAccumulators / vectors : kMostRows; }

// R rows by V registers of c = (or +=) a b over `depth`, the sums in registers.
template <int R, int V>
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
      for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
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
template <int R, int V>
inline void product_rest(int64_t rows, Left a, const float* b, int64_t b_pitch, float* c, int64_t c_pitch, int64_t depth,
                         bool add) {
  if constexpr (R > 0) {
    if (rows == R) return product_tile<R, V>(a, b, b_pitch, c, c_pitch, depth, add);
    product_rest<R - 1, V>(rows, a, b, b_pitch, c, c_pitch, depth, add);
  }
}

template <int V>
void product_columns(int64_t rows, Left a, const float* b, int64_t b_pitch, float* c, int64_t c_pitch, int64_t depth,
                     bool add) {
  constexpr int R = tile_rows(V);
  int64_t i = 0;
  for (; i + R <= rows; i += R)
    product_tile<R, V>({a.data + i * a.row, a.row, a.column}, b, b_pitch, c + i * c_pitch, c_pitch, depth, add);
  product_rest<R - 1, V>(rows - i, {a.data + i * a.row, a.row, a.column}, b, b_pitch, c + i * c_pitch, c_pitch, depth,
                         add);
}

// c [rows, columns] = (or +=) a [rows, depth] b [depth, columns]; columns a multiple of kLanes.
inline void product(int64_t rows, int64_t columns, int64_t depth, Left a, Matrix32 b, Matrix32 c, bool add = false) {
  int64_t left = columns / kLanes;
  for (int64_t column = 0; left > 0;) {
    const int64_t strips = (left + kMostVectors - 1) / kMostVectors, vectors = (left + strips - 1) / strips;
    const float* from = b.data + column;
    float* to = c.data + column;
    switch (vectors) {
      case 1: product_columns<1>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
      case 2: product_columns<2>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
      case 3: product_columns<3>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
      default: product_columns<4>(rows, a, from, b.pitch, to, c.pitch, depth, add); break;
    }
    left -= vectors;
    column += vectors * kLanes;
  }
}

// Transposes a square of registers by interleaving halves log2(kLanes) times.
inline void transpose_square(vfloat (&square)[kLanes]) {
  vint low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kLanes;
    high[lane] = low[lane] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int width = 1; width < kLanes; width *= 2) {
    vfloat next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(square[i], square[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(square[i], square[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) square[i] = next[i];
  }
}

}  // namespace MINBERT_ISA
}  // namespace minbert
