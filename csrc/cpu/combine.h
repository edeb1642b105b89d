// SPDX-License-Identifier: Apache-2.0
// g = w J, a block of columns at a time, for combine and adamw.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace minbert {
namespace MINBERT_ISA {

constexpr int64_t kBlock = 1024;  // columns; a block of g stays in the first-level cache

// The rows of non-zero weight, and their weights.
struct Rows {
  int count = 0;
  int64_t offset[kMaxTasks];  // of the row from the first, elements
  float weight[kMaxTasks];

  Rows(const Matrix& j, const float* w) {
    for (int t = 0; t < j.rows; ++t) {
      const float weight_t = w ? w[t] : 1.0f;
      if (weight_t == 0) continue;
      offset[count] = t * j.stride;
      weight[count++] = weight_t;
    }
  }
};

// out (= or +=) the weighted sum of R rows from `column` on.
template <int R, bool Add, class T>
void add_rows(const T* data, const int64_t* offset, const float* weight, int64_t column, int64_t n, float* __restrict out) {
  const T* row[R];
  for (int r = 0; r < R; ++r) row[r] = data + offset[r] + column;
  for (int64_t i = 0; i < n; ++i) {
    float sum = Add ? out[i] : 0.0f;
    for (int r = 0; r < R; ++r) sum += weight[r] * to_float(row[r][i]);
    out[i] = sum;
  }
}

// out [n] = (w J)[column : column + n], tasks added in their order.
template <class T>
void combine_block(const T* data, const Rows& rows, int64_t column, int64_t n, float* out) {
  const int64_t* offset = rows.offset;
  const float* weight = rows.weight;
  switch (rows.count < 4 ? rows.count : 4) {
    case 0: for (int64_t i = 0; i < n; ++i) out[i] = 0; break;
    case 1: add_rows<1, false>(data, offset, weight, column, n, out); break;
    case 2: add_rows<2, false>(data, offset, weight, column, n, out); break;
    case 3: add_rows<3, false>(data, offset, weight, column, n, out); break;
    default: add_rows<4, false>(data, offset, weight, column, n, out); break;
  }
  int r = 4;
  for (; r + 4 <= rows.count; r += 4) add_rows<4, true>(data, offset + r, weight + r, column, n, out);
  for (; r < rows.count; ++r) add_rows<1, true>(data, offset + r, weight + r, column, n, out);
}

}  // namespace MINBERT_ISA
}  // namespace minbert
