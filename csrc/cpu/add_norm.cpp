// SPDX-License-Identifier: Apache-2.0
// y = LayerNorm(residual + dropout(x + bias)): one pass over memory forward and one backward. The sum before the norm and
// the dropout factors are made again in the backward, not stored.
#include "cpu/column_sums.h"
#include "cpu/layer_norm.h"
#include "cpu/layer_kernels.h"
#include "cpu/philox.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

enum Sums : int64_t { kGamma, kBeta, kBias, kSums };

// Where one row's operands lie.
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
void forward_row(const AddNorm& op, int64_t row, const float* beta, float eps, T* y, float* mean, float* rstd) {
  alignas(64) float keep[kMaxWidth], z[kMaxWidth];
  const Row<T> in = row_of<T>(op, row, keep);
  Sum total;
  for_columns(op.width, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
    const vfloat v = in.sum(i, lanes);
    store(z + i, v);
    total.add(slot, v);
  });
  const Statistics s = statistics(z, op.width, total.total(), eps);
  y += row * op.width;
  for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
    const vfloat xhat = (load(z + i) - s.mean) * s.rstd;
    store(y + i, xhat * load(op.gamma + i, lanes) + load(beta + i, lanes), lanes);
  });
  mean[row] = s.mean;
  rstd[row] = s.rstd;
}

template <class T>
void backward_row(const AddNorm& op, int64_t row, const T* dy, Statistics s, T* dx, T* dresidual, float* slot,
                  int64_t pitch) {
  alignas(64) float keep[kMaxWidth], xhat[kMaxWidth];
  const Row<T> in = row_of<T>(op, row, keep);
  const int64_t at = row * op.width;
  dy += at, dx += at, dresidual += at;
  const NormGradient gradient = norm_gradient(
      op.width, s, op.gamma,
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

template <class T>
void forward(const AddNorm& op, const float* beta, float eps, T* y, float* mean, float* rstd, int threads) {
  const Chunks chunks = row_chunks(op.rows);
  parallel_for(chunks.count, threads, [&](int64_t chunk) {
    for (int64_t row = chunks.begin(chunk); row < chunks.end(chunk); ++row)
      forward_row(op, row, beta, eps, y, mean, rstd);
  });
}

template <class T>
void backward(const AddNorm& op, const T* dy, const float* mean, const float* rstd, const Segments& segments, T* dx,
              T* dresidual, const TaskGradient& dgamma, const TaskGradient& dbeta, const TaskGradient& dbias,
              float* slots, int threads) {
  const TaskSums sums(segments, op.rows, kSums, op.width, slots);
  parallel_for(sums.chunks(), threads, [&](int64_t chunk) {
    sums.for_tasks(chunk, [&](int64_t begin, int64_t end, float* slot) {
      for (int64_t row = begin; row < end; ++row)
        backward_row(op, row, dy, {mean[row], rstd[row]}, dx, dresidual, slot, sums.pitch());
    });
    const int64_t first = sums.padding(chunk) * op.width, count = sums.end(chunk) * op.width - first;
    std::memset(dx + first, 0, static_cast<size_t>(count) * sizeof(T));
    std::memset(dresidual + first, 0, static_cast<size_t>(count) * sizeof(T));
  });
  sums.finish(kGamma, dgamma, threads);
  sums.finish(kBeta, dbeta, threads);
  sums.finish(kBias, dbias, threads);
}

}  // namespace

void add_norm_rows(const AddNorm& op, const float* beta, float eps, void* y, float* mean, float* rstd, int threads) {
  if (op.dtype == DType::bf16)
    forward(op, beta, eps, static_cast<bfloat16*>(y), mean, rstd, threads);
  else
    forward(op, beta, eps, static_cast<float*>(y), mean, rstd, threads);
}

void add_norm_rows_backward(const AddNorm& op, const void* dy, const float* mean, const float* rstd,
                            const Segments& segments, void* dx, void* dresidual, const TaskGradient& dgamma,
                            const TaskGradient& dbeta, const TaskGradient& dbias, float* slots, int threads) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    backward(op, static_cast<const T*>(dy), mean, rstd, segments, static_cast<T*>(dx), static_cast<T*>(dresidual),
             dgamma, dbeta, dbias, slots, threads);
  };
  op.dtype == DType::bf16 ? run(bfloat16{}) : run(float{});
}

}  // namespace MINBERT_ISA
}  // namespace minbert
