// SPDX-License-Identifier: Apache-2.0
// g = w J, and AdamW fed by it without g ever reaching memory: a block of g lives in the first-level cache.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // columns
// Results larger than this are not found in a cache later, so they are written past it.
constexpr int64_t kStreaming = int64_t{4} << 20;  // elements

// The rows that take part, and their weights.
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

void adamw_block(const AdamWCoefficients& a, const float* __restrict gradient, const Parameters& to, int64_t begin,
                 int64_t n) {
  float* __restrict p = to.p + begin;
  float* __restrict m = to.m + begin;
  float* __restrict v = to.v + begin;
  const AdamWCoefficients c = a;  // a local that no store can change
  for (int64_t i = 0; i < n; ++i) c.update(gradient[i], p[i], m[i], v[i]);
  if (to.copy) from_floats(p, to.copy + begin, n);
}

template <class T>
void combine_rows_of(const Matrix& j, const float* w, float* out, int threads) {
  const T* data = static_cast<const T*>(j.data);
  const Rows rows(j, w);
  const bool streaming = j.columns >= kStreaming && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const Chunks chunks(j.columns, 16 * kBlock, 1024);
  parallel_for(chunks.count, threads, [&](int64_t chunk) {
    alignas(64) float block[kBlock];
    for (int64_t column = chunks.begin(chunk); column < chunks.end(chunk); column += kBlock) {
      const int64_t left = chunks.end(chunk) - column;
      if (streaming && left >= kBlock) {
        combine_block(data, rows, column, kBlock, block);
        for (int64_t i = 0; i < kBlock; i += kLanes) store_streaming(out + column + i, load(block + i));
      } else {
        combine_block(data, rows, column, left < kBlock ? left : kBlock, out + column);
      }
    }
  });
}

template <class T>
void adamw_dense_of(const Matrix& j, const float* w, const Parameters& p, const AdamWCoefficients& a, int threads) {
  const T* data = static_cast<const T*>(j.data);
  const Rows rows(j, w);
  const Chunks chunks(j.columns, 16 * kBlock, 1024);
  parallel_for(chunks.count, threads, [&](int64_t chunk) {
    alignas(64) float gradient[kBlock];
    for (int64_t column = chunks.begin(chunk); column < chunks.end(chunk); column += kBlock) {
      const int64_t left = chunks.end(chunk) - column, n = left < kBlock ? left : kBlock;
      combine_block(data, rows, column, n, gradient);
      adamw_block(a, gradient, p, column, n);
    }
  });
}

template <class T>
void adamw_sparse_of(const Matrix& j, const float* w, const int32_t* row_slot, int64_t width, const Parameters& p,
                     const AdamWCoefficients& a, int threads) {
  const T* data = static_cast<const T*>(j.data);
  const Rows rows(j, w);
  const Rows none(Matrix{nullptr, j.dtype, 0, 0, 0}, nullptr);
  const Chunks chunks(p.count / width, 16, 1024);
  parallel_for(chunks.count, threads, [&](int64_t chunk) {
    alignas(64) float gradient[kBlock];
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row) {
      const int64_t slot = row_slot[row];
      for (int64_t column = 0; column < width; column += kBlock) {
        const int64_t n = width - column < kBlock ? width - column : kBlock;
        combine_block(data, slot < 0 ? none : rows, slot < 0 ? 0 : slot * width + column, n, gradient);
        adamw_block(a, gradient, p, row * width + column, n);
      }
    }
  });
}

}  // namespace

void combine_rows(const Matrix& j, const float* w, float* out, int threads) {
  return j.dtype == DType::bf16 ? combine_rows_of<bfloat16>(j, w, out, threads) : combine_rows_of<float>(j, w, out, threads);
}

void adamw_dense(const Matrix& j, const float* w, const Parameters& p, const AdamWCoefficients& a, int threads) {
  return j.dtype == DType::bf16 ? adamw_dense_of<bfloat16>(j, w, p, a, threads) : adamw_dense_of<float>(j, w, p, a, threads);
}

void adamw_sparse(const Matrix& j, const float* w, const int32_t* row_slot, int64_t width, const Parameters& p,
                  const AdamWCoefficients& a, int threads) {
  return j.dtype == DType::bf16 ? adamw_sparse_of<bfloat16>(j, w, row_slot, width, p, a, threads)
                                : adamw_sparse_of<float>(j, w, row_slot, width, p, a, threads);
}

}  // namespace MINBERT_ISA
}  // namespace minbert
