// SPDX-License-Identifier: Apache-2.0
// The bias gradients of linear on the CPU: checks their arguments. The loops are in cpu/linear.cpp.
#include "cpu/linear.h"

#include "arguments.h"
#include "encoder.h"

namespace minbert {

void column_sums(Tensor x, Tensor bounds, Tensor out, int threads) {
  Arguments a;
  ColumnSums op{};
  op.x = a.dense("x", x, {kAny, kAny}, kActivations);
  op.dtype = x.dtype(), op.rows = x.size(0), op.width = x.size(1);
  op.segments = a.segments(bounds, op.rows);
  op.out = a.gradient("out", out, {op.segments.tasks, op.width});
  op.slots = a.floats(slot_floats(op.rows, op.segments.tasks, 1, op.width));
  call_column_sums(op, threads);
}

}  // namespace minbert
