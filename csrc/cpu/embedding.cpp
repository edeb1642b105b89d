// SPDX-License-Identifier: Apache-2.0
// y = dropout(LayerNorm(word[tokens] + position[positions] + type[types])). The backward first computes dz, the
// gradient of the sum, row by row. Then each row of a table's gradient adds up its rows of dz, in ascending order.
#include "cpu/embedding.h"

#include "cpu/layer_norm.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

enum Sums : int64_t { kGamma, kBeta, kSums };

// The three table rows of one token.
template <class T>
struct Row {
  const T *word, *position, *type;

  Row(const Embedding& op, int64_t row)
      : word(at(op, op.lookups[0], row)), position(at(op, op.lookups[1], row)), type(at(op, op.lookups[2], row)) {}

  static const T* at(const Embedding& op, const Lookup& lookup, int64_t row) {
    return static_cast<const T*>(lookup.table) + lookup.index[row] * op.width;
  }

  template <class Lanes>
  vfloat sum(int64_t i, Lanes lanes) const {
    return load(word + i, lanes) + load(position + i, lanes) + load(type + i, lanes);
  }
};

void draw(const Embedding& op, int64_t row, float* keep) {
  if (op.dropout.active) DropoutRow(op.dropout, 0, static_cast<uint32_t>(row)).factors(op.width, keep);
}

template <class T>
void forward_row(const Embedding& op, int64_t row) {
  alignas(64) float keep[kMaxWidth], z[kMaxWidth];
  const Row<T> in(op, row);
  draw(op, row, keep);
  Sum total;
  for_columns(op.width, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
    const vfloat v = in.sum(i, lanes);
    store(z + i, v);
    total.add(slot, v);
  });
  const Statistics s = statistics(z, op.width, total.total(), op.eps);
  T* y = static_cast<T*>(op.y) + row * op.width;
  for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
    const vfloat xhat = (load(z + i) - s.mean) * s.rstd;
    const vfloat v = xhat * load(op.gamma + i, lanes) + load(op.beta + i, lanes);
    store(y + i, op.dropout.active ? v * load(keep + i) : v, lanes);
  });
  op.mean[row] = s.mean;
  op.rstd[row] = s.rstd;
}

template <class T>
void backward_row(const Embedding& op, int64_t row, float* slot, int64_t pitch) {
  alignas(64) float keep[kMaxWidth], xhat[kMaxWidth];
  const Row<T> in(op, row);
  draw(op, row, keep);
  const T* dy = static_cast<const T*>(op.dy) + row * op.width;
  float* dz = op.dz + row * op.width;
  const auto cotangent = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const vfloat v = load(dy + i, lanes);
    return op.dropout.active ? v * load(keep + i) : v;
  };
  const NormGradient gradient = norm_gradient(
      op.width, {op.mean[row], op.rstd[row]}, op.gamma,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) { return in.sum(i, lanes); }, cotangent, xhat,
      slot + kGamma * pitch, slot + kBeta * pitch);
  for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
    store(dz + i, gradient(cotangent(i, lanes) * load(op.gamma + i, lanes), load(xhat + i)), lanes);
  });
}

constexpr int64_t kBlock = 256;  // columns summed at a time

// out [n] = the sum of `count` rows of x.
template <class T>
void add_group(const float* x, int64_t width, const int32_t* rows, int64_t count, int64_t n, T* out) {
  alignas(64) float total[kBlock] = {};
  for (int64_t r = 0; r < count; ++r) {
    const float* row = x + rows[r] * width;
    for_columns(n, [&](int64_t i, auto lanes, int) { store(total + i, load(total + i) + load(row + i, lanes)); });
  }
  for_columns(n, [&](int64_t i, auto lanes, int) { store(out + i, load(total + i), lanes); });
}

// The first of ascending numbers that is not below `bound`.
const int32_t* first_from(const int32_t* begin, const int32_t* end, int32_t bound) {
  while (begin < end) {
    const int32_t* middle = begin + (end - begin) / 2;
    if (*middle < bound)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

}  // namespace

void embedding_forward(const Embedding& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    for_rows(op.rows, threads, [&](int64_t row) { forward_row<decltype(element)>(op, row); });
  });
}

void embedding_backward(const Embedding& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    const TaskSums sums(op.segments, op.rows, kSums, op.width, op.slots);
    sums.for_rows(threads, [&](int64_t row, float* slot) {
      backward_row<decltype(element)>(op, row, slot, sums.pitch());
    });
    sums.finish(kGamma, op.dgamma, threads);
    sums.finish(kBeta, op.dbeta, threads);
  });
}

void gather_sums(const Embedding& op, const Groups& groups, const TaskGradient& out, int threads) {
  if (!out.data) return;
  constexpr int64_t kBatch = 8;  // groups a thread takes at a time
  const int64_t batches = (groups.count + kBatch - 1) / kBatch, blocks = (op.width + kBlock - 1) / kBlock;
  parallel_for(op.segments.tasks * batches * blocks, threads, [&](int64_t item) {
    const int64_t task = item / blocks / batches, first = item / blocks % batches * kBatch;
    const int64_t column = item % blocks * kBlock, n = op.width - column < kBlock ? op.width - column : kBlock;
    for (int64_t group = first; group < first + kBatch && group < groups.count; ++group) {
      const int32_t *begin = groups.order + groups.offsets[group], *end = groups.order + groups.offsets[group + 1];
      begin = first_from(begin, end, op.segments.bounds[task]);
      end = first_from(begin, end, op.segments.bounds[task + 1]);
      with_element(out.dtype, [&](auto element) {
        auto* to = static_cast<decltype(element)*>(out.data) + task * out.stride + group * op.width + column;
        add_group(op.dz + column, op.width, begin, end - begin, n, to);
      });
    }
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
