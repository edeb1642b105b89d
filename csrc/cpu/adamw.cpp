// SPDX-License-Identifier: Apache-2.0
// AdamW on g = w J, without g ever reaching memory.
#include "cpu/combine.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

void adamw_block(const AdamWCoefficients& a, const float* __restrict gradient, const AdamW& to, int64_t begin,
                 int64_t n) {
  float* __restrict p = to.p + begin;
  float* __restrict m = to.m + begin;
  float* __restrict v = to.v + begin;
  const AdamWCoefficients c = a;  // a local that no store can change
  for (int64_t i = 0; i < n; ++i) c.update(gradient[i], p[i], m[i], v[i]);
  if (to.copy)
    for (int64_t i = 0; i < n; ++i) to.copy[begin + i] = to_bfloat16(p[i]);
}

}  // namespace

void adamw_rows(const Matrix& j, const float* w, const AdamW& to, const AdamWCoefficients& a, int threads) {
  const Rows rows(j, w);
  const Rows none(Matrix{nullptr, j.dtype, 0, 0, 0}, nullptr);
  const int64_t blocks = (to.width + kBlock - 1) / kBlock;  // of a row
  const Chunks chunks(to.count / to.width * blocks, 16, 1024);
  with_element(j.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(j.data);
    parallel_for(chunks.count, threads, [&](int64_t chunk) {
      alignas(64) float gradient[kBlock];
      for (int64_t block = chunks.begin(chunk); block < chunks.end(chunk); ++block) {
        const int64_t row = block / blocks, column = block % blocks * kBlock;
        const int64_t n = to.width - column < kBlock ? to.width - column : kBlock;
        const int64_t slot = to.row_slot ? to.row_slot[row] : 0;
        combine_block(data, slot < 0 ? none : rows, slot < 0 ? 0 : slot * to.width + column, n, gradient);
        adamw_block(a, gradient, to, row * to.width + column, n);
      }
    });
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
