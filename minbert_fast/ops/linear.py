# SPDX-License-Identifier: Apache-2.0
"""y = x W^T (+ b), whose weight gradient can be computed for each task: J[t] = dY[rows of t]^T X[rows of t].

Shapes: N token rows, I inputs, O outputs, T tasks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minbert_fast.ops import native, segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.grouped import Product, Tape
from minbert_fast.ops.library import custom_op


class LinearSink(NamedTuple):
    """Where the backward writes each task's parameter gradients; None for a frozen parameter."""

    bounds: Tensor  # [T + 1] int32, token rows of the tasks
    dweight: Tensor | None = None  # [T, O, I], any task stride; overwritten, as the one below
    dbias: Tensor | None = None  # [T, O]
    tape: Tape | None = None  # takes them for later; None: they are computed at once


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, into: LinearSink | None = None) -> Tensor:
    """x [..., I] W^T (+ bias) -> [..., O]; weight [O, I].

    With `into` (x [N, I]), weight and bias are constants for autograd, and each task's gradients of them go into the sink.
    Rows from bounds[T] on add to none. Without `into`, this is torch.nn.functional.linear.
    """
    if into is None:
        return F.linear(x, weight, bias)
    return _LinearInto.apply(x, weight, bias, into, segments.anchor(x.device))


@custom_op("linear_gradients", mutates_args=("dweight", "dbias"))
def linear_gradients(dy: Tensor, x: Tensor, bounds: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> None:
    """dy [N, O], x [N, I] of one dtype -> dweight[t] = dy[rows of t]^T x[rows of t] [T, O, I], dbias [T, O].

    Sums are fp32 for every input dtype. Outputs are overwritten, with zeros for an empty task.
    """
    choice = implementation(dy)
    if choice == "triton":
        from minbert_fast.kernels import linear as kernels

        kernels.linear_gradients(dy.contiguous(), x.contiguous(), bounds, dweight, dbias)
        return
    for task, (begin, end) in enumerate(segments.row_ranges(bounds)):
        if dweight is not None:
            _product(dy[begin:end].T, x[begin:end], dweight[task])
        if dbias is not None and choice == "torch":
            dbias[task] = dy[begin:end].sum(0, dtype=segments.statistics_dtype(dy.dtype))
    if dbias is not None and choice == "native":
        native.call("column_sums", dy.contiguous(), bounds, dbias)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b. If the dtypes differ, a CPU first rounds to the operands' dtype, as plain PyTorch does."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(a @ b)


class _LinearInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, into: LinearSink, anchor: Tensor) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        bounds, dweight, dbias, tape = ctx.into
        if tape is None:
            linear_gradients(dy, x, bounds, dweight, dbias)
        else:
            tape.product(Product(dy, x, dweight, dbias))
        return (dy @ weight if ctx.needs_input_grad[0] else None), None, None, None, None
