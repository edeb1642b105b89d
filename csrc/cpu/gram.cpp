// SPDX-License-Identifier: Apache-2.0
// G = J J^T with J read from memory once.
//
// A chunk is walked in blocks of 512 columns: all T rows of a block fit in the second-level cache, and every pair of
// rows is multiplied while they are there, in square tiles of rows whose sums stay in registers. Sums run in fp32 lanes
// over at most 8,192 columns, then in double.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

constexpr int kBlock = 512;                          // columns
constexpr int kTile = kRegisters >= 32 ? 4 : 3;      // rows; a tile's sums and one row of operands fit in registers
constexpr int kPairs = kMaxTasks * (kMaxTasks + 1) / 2;
static_assert(kBlock % (4 * kLanes) == 0);

// The index of the sum of rows i <= k in the upper triangle.
inline int pair_index(int i, int k, int tasks) { return i * (2 * tasks - i - 1) / 2 + k; }

// The R (R + 1) / 2 products among R rows. Few rows take several columns at a time, or each sum would wait for itself.
template <int R>
void diagonal_tile(const float* const* rows, int first, int tasks, int columns, vfloat* sums) {
  constexpr int kUnroll = R == 1 ? 4 : R == 2 ? 2 : 1;
  vfloat total[kUnroll][R][R] = {};
  for (int column = 0; column < columns; column += kUnroll * kLanes)
    for (int u = 0; u < kUnroll; ++u) {
      vfloat x[R];
      for (int r = 0; r < R; ++r) x[r] = load(rows[first + r] + column + u * kLanes);
      for (int r = 0; r < R; ++r)
        for (int s = r; s < R; ++s) total[u][r][s] += x[r] * x[s];
    }
  for (int r = 0; r < R; ++r)
    for (int s = r; s < R; ++s)
      for (int u = 0; u < kUnroll; ++u) sums[pair_index(first + r, first + s, tasks)] += total[u][r][s];
}

// The R S products of R rows with S later rows.
template <int R, int S>
void tile(const float* const* rows, int first, int second, int tasks, int columns, vfloat* sums) {
  vfloat total[R][S] = {};
  for (int column = 0; column < columns; column += kLanes) {
    vfloat y[S];
    for (int s = 0; s < S; ++s) y[s] = load(rows[second + s] + column);
    for (int r = 0; r < R; ++r) {
      const vfloat x = load(rows[first + r] + column);
      for (int s = 0; s < S; ++s) total[r][s] += x * y[s];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int s = 0; s < S; ++s) sums[pair_index(first + r, second + s, tasks)] += total[r][s];
}

// All products among the rows of one block; `columns` is a multiple of 4 registers.
void block_products(const float* const* rows, int tasks, int columns, vfloat* sums) {
  for (int first = 0; first < tasks; first += kTile) {
    switch (tasks - first) {
      case 1: diagonal_tile<1>(rows, first, tasks, columns, sums); break;
      case 2: diagonal_tile<2>(rows, first, tasks, columns, sums); break;
      case 3: diagonal_tile<3>(rows, first, tasks, columns, sums); break;
      default: diagonal_tile<kTile>(rows, first, tasks, columns, sums); break;
    }
    for (int second = first + kTile; second < tasks; second += kTile) {
      switch (tasks - second) {
        case 1: tile<kTile, 1>(rows, first, second, tasks, columns, sums); break;
        case 2: tile<kTile, 2>(rows, first, second, tasks, columns, sums); break;
        case 3: tile<kTile, 3>(rows, first, second, tasks, columns, sums); break;
        default: tile<kTile, kTile>(rows, first, second, tasks, columns, sums); break;
      }
    }
  }
}

void flush(vfloat* sums, double* partial, int pairs) {
  for (int pair = 0; pair < pairs; ++pair) {
    partial[pair] += sum(sums[pair]);
    sums[pair] = vfloat{};
  }
}

template <class T>
void chunk_products(const Matrix& j, int64_t begin, int64_t end, double* partial) {
  constexpr int64_t kFlush = 8192;
  const int tasks = static_cast<int>(j.rows), pairs = tasks * (tasks + 1) / 2;
  const T* data = static_cast<const T*>(j.data);
  alignas(64) vfloat sums[kPairs];
  alignas(64) float buffer[kMaxTasks][kBlock];
  const float* rows[kMaxTasks];
  for (int pair = 0; pair < pairs; ++pair) sums[pair] = vfloat{}, partial[pair] = 0;

  for (int64_t column = begin; column < end; column += kBlock) {
    const int width = static_cast<int>(end - column < kBlock ? end - column : kBlock);
    constexpr int kStep = 4 * kLanes;
    const int padded = (width + kStep - 1) / kStep * kStep;
    for (int t = 0; t < tasks; ++t) {
      const T* row = data + t * j.stride + column;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (width == padded) {
          rows[t] = row;
          continue;
        }
      }
      for (int i = 0; i < width; ++i) buffer[t][i] = to_float(row[i]);
      for (int i = width; i < padded; ++i) buffer[t][i] = 0;
      rows[t] = buffer[t];
    }
    block_products(rows, tasks, padded, sums);
    if ((column + kBlock - begin) % kFlush == 0) flush(sums, partial, pairs);
  }
  flush(sums, partial, pairs);
}

}  // namespace

void gram_partials(const Matrix& j, double* partials, int threads) {
  const Chunks chunks = gram_chunks(j.columns);
  const int64_t pairs = j.rows * (j.rows + 1) / 2;
  parallel_for(chunks.count, threads, [&](int64_t chunk) {
    with_element(j.dtype, [&](auto element) {
      chunk_products<decltype(element)>(j, chunks.begin(chunk), chunks.end(chunk), partials + chunk * pairs);
    });
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
