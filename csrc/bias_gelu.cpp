// SPDX-License-Identifier: Apache-2.0
// bias_gelu on the CPU: checks its arguments. The loops are in cpu/bias_gelu.cpp.
#include "cpu/bias_gelu.h"

#include "arguments.h"
#include "encoder.h"

namespace minbert {
namespace {

BiasGelu inputs(Arguments& a, Tensor x, Tensor bias) {
  BiasGelu op{};
  op.x = a.dense("x", x, {kAny, kAny}, kActivations);
  op.dtype = x.dtype(), op.rows = x.size(0), op.width = x.size(1);
  op.bias = a.vector("bias", bias, op.width, op.dtype);
  return op;
}

}  // namespace

void bias_gelu_forward(Tensor x, Tensor bias, Tensor y, int threads) {
  Arguments a;
  BiasGelu op = inputs(a, x, bias);
  op.y = a.dense("y", y, {op.rows, op.width}, {op.dtype});
  call_bias_gelu_forward(op, threads);
}

void bias_gelu_backward(Tensor dy, Tensor x, Tensor bias, Tensor bounds, Tensor dbias, Tensor dx, int threads) {
  Arguments a;
  BiasGelu op = inputs(a, x, bias);
  op.dy = a.dense("dy", dy, {op.rows, op.width}, {op.dtype});
  op.segments = a.segments(bounds, op.rows);
  op.dx = a.dense("dx", dx, {op.rows, op.width}, {op.dtype});
  op.dbias = a.gradient("dbias", dbias, {op.segments.tasks, op.width});
  op.slots = a.floats(slot_floats(op.rows, op.segments.tasks, 1, op.width));
  call_bias_gelu_backward(op, threads);
}

}  // namespace minbert
