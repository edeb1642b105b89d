// SPDX-License-Identifier: Apache-2.0
#include "cpu/linear.h"

namespace minbert {
namespace MINBERT_ISA {

void column_sums(const ColumnSums& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    const auto* x = static_cast<const decltype(element)*>(op.x);
    const TaskSums sums(op.segments, op.rows, 1, op.width, op.slots);
    sums.for_rows(threads, [&](int64_t row, float* slot) {
      for_columns(op.width, [&](int64_t i, auto lanes, int) __attribute__((always_inline)) {
        store(slot + i, load(slot + i) + load(x + row * op.width + i, lanes));
      });
    });
    sums.finish(0, op.out, threads);
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
