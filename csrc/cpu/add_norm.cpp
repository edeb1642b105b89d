// SPDX-License-Identifier: Apache-2.0
// y = LayerNorm(residual + dropout(x + bias)): one pass over memory forward and one backward. The backward computes the
// sum before the norm and the dropout factors again; they are not stored.
#include "cpu/add_norm.h"

#include "cpu/layer_norm.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

enum Sums : int64_t { kGamma, kBeta, kBias, kSums };

// Pointers to one row's operands.
template <class T>
struct Row {
  const T *x, *residual;
  const float *bias, *keep;  // keep: null without dropout

  template <class Lanes>
  vfloat sum(int64_t i, Lanes lanes) const {
    const vfloat branch = load(x + i, lanes) + load(bias + i, lanes);
    return load(residual + i, lanes) + (keep ? branch * load(keep + i) : branch);
  }
};

template <class T>
Row<T> row_of(const AddNorm& op, int64_t row, float* keep) {
  const int64_t at = row * op.width;
  if (op.dropout.active) DropoutRow(op.dropout, 0, static_cast<uint32_t>(row)).factors(op.width, keep);
  return {static_cast<const T*>(op.x) + at, static_cast<const T*>(op.residual) + at, op.bias,
          op.dropout.active ? keep : nullptr};
}

template <class T>
void forward_row(const AddNorm& op, int64_t row) {
  alignas(64) float keep[kMaxWidth], z[kMaxWidth];
  const Row<T> in = row_of<T>(op, row, keep);
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
    store(y + i, xhat * load(op.gamma + i, lanes) + load(op.beta + i, lanes), lanes);
  });
  op.mean[row] = s.mean;
  op.rstd[row] = s.rstd;
}

template <class T>
void backward_row(const AddNorm& op, int64_t row, float* slot, int64_t pitch) {
  alignas(64) float keep[kMaxWidth], xhat[kMaxWidth];
  const Row<T> in = row_of<T>(op, row, keep);
  const int64_t at = row * op.width;
  const T* dy = static_cast<const T*>(op.dy) + at;
  T *dx = static_cast<T*>(op.dx) + at, *dresidual = static_cast<T*>(op.dresidual) + at;
  const NormGradient gradient = norm_gradient(
      op.width, {op.mean[row], op.rstd[row]}, op.gamma,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) { return in.sum(i, lanes); },
      [&](int64_t i, auto lanes) __attribute__((always_inline)) { return load(dy + i, lanes); },
      xhat, slot + kGamma * pitch, slot + kBeta * pitch);
  float* dbias = slot + kBias * pitch;
  for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
    const vfloat dz = gradient(load(dy + i, lanes) * load(op.gamma + i, lanes), load(xhat + i));
    const vfloat branch = in.keep ? dz * load(keep + i) : dz;
    store(dresidual + i, dz, lanes);
    store(dx + i, branch, lanes);
    store(dbias + i, load(dbias + i) + branch);
  });
}

}  // namespace

void add_norm_forward(const AddNorm& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    for_rows(op.rows, threads, [&](int64_t row) { forward_row<decltype(element)>(op, row); });
  });
}

void add_norm_backward(const AddNorm& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    const TaskSums sums(op.segments, op.rows, kSums, op.width, op.slots);
    sums.for_rows(threads, [&](int64_t row, float* slot) { backward_row<T>(op, row, slot, sums.pitch()); });
    sums.clear_padding(static_cast<T*>(op.dx));
    sums.clear_padding(static_cast<T*>(op.dresidual));
    sums.finish(kGamma, op.dgamma, threads);
    sums.finish(kBeta, op.dbeta, threads);
    sums.finish(kBias, op.dbias, threads);
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
