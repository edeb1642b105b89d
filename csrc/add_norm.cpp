// SPDX-License-Identifier: Apache-2.0
// add_norm on the CPU: checks its arguments. The loops are in cpu/add_norm.cpp.
#include "cpu/add_norm.h"

#include "arguments.h"
#include "encoder.h"

namespace minbert {
namespace {

AddNorm inputs(Arguments& a, Tensor x, Tensor bias, Tensor residual, Tensor gamma, double p, Tensor seed,
               int64_t site) {
  AddNorm op{};
  op.x = a.dense("x", x, {kAny, kAny}, kActivations);
  op.dtype = x.dtype(), op.rows = x.size(0), op.width = x.size(1);
  Arguments::width(op.width);
  op.residual = a.dense("residual", residual, {op.rows, op.width}, {op.dtype});
  op.bias = a.vector("bias", bias, op.width, op.dtype);
  op.gamma = a.vector("gamma", gamma, op.width, op.dtype);
  op.dropout = a.dropout(p, seed, site);
  return op;
}

}  // namespace

void add_norm_forward(Tensor x, Tensor bias, Tensor residual, Tensor gamma, Tensor beta, float eps, double p,
                      Tensor seed, int64_t site, Tensor y, Tensor mean, Tensor rstd, int threads) {
  Arguments a;
  AddNorm op = inputs(a, x, bias, residual, gamma, p, seed, site);
  op.beta = a.vector("beta", beta, op.width, op.dtype), op.eps = eps;
  op.y = a.dense("y", y, {op.rows, op.width}, {op.dtype});
  op.mean = a.dense<float>("mean", mean, {op.rows}, {DType::f32});
  op.rstd = a.dense<float>("rstd", rstd, {op.rows}, {DType::f32});
  call_add_norm_forward(op, threads);
}

void add_norm_backward(Tensor dy, Tensor x, Tensor bias, Tensor residual, Tensor gamma, Tensor mean, Tensor rstd,
                       Tensor bounds, double p, Tensor seed, int64_t site, Tensor dgamma, Tensor dbeta, Tensor dbias,
                       Tensor dx, Tensor dresidual, int threads) {
  Arguments a;
  AddNorm op = inputs(a, x, bias, residual, gamma, p, seed, site);
  op.dy = a.dense("dy", dy, {op.rows, op.width}, {op.dtype});
  op.mean = a.dense<float>("mean", mean, {op.rows}, {DType::f32});
  op.rstd = a.dense<float>("rstd", rstd, {op.rows}, {DType::f32});
  op.segments = a.segments(bounds, op.rows);
  op.dx = a.dense("dx", dx, {op.rows, op.width}, {op.dtype});
  op.dresidual = a.dense("dresidual", dresidual, {op.rows, op.width}, {op.dtype});
  op.dgamma = a.gradient("dgamma", dgamma, {op.segments.tasks, op.width});
  op.dbeta = a.gradient("dbeta", dbeta, {op.segments.tasks, op.width});
  op.dbias = a.gradient("dbias", dbias, {op.segments.tasks, op.width});
  op.slots = a.floats(slot_floats(op.rows, op.segments.tasks, 3, op.width));
  call_add_norm_backward(op, threads);
}

}  // namespace minbert
