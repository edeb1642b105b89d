# SPDX-License-Identifier: Apache-2.0
"""y = GELU(x + bias) in the erf form: the op after the first feed-forward product of a layer.

Shapes: N token rows, F intermediate, T tasks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minbert_fast.ops import segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.grouped import Tape, Unfinished
from minbert_fast.ops.library import kernel_op


def reference(x: Tensor, bias: Tensor) -> Tensor:
    """The op in plain PyTorch (Hendrycks & Gimpel 2016)."""
    return F.gelu(x + bias)


class BiasGeluSink(NamedTuple):
    """Where the backward writes each task's bias gradient; None when the bias is frozen."""

    bounds: Tensor  # [T + 1] int32, token rows of the tasks
    dbias: Tensor | None = None  # [T, F], any task stride; overwritten
    tape: Tape | None = None  # takes it for later; None: it is computed at once


def bias_gelu(x: Tensor, bias: Tensor, into: BiasGeluSink | None = None) -> Tensor:
    """GELU(x + bias) with the exact (erf) GELU; x [..., F], bias [F] of x's dtype or fp32.

    Differentiable once in both. With `into` (x [N, F]), the bias is a constant for autograd, and each task's gradient of it
    goes into the sink. Rows from bounds[T] on get no gradient and add to none. Raises ValueError if shapes disagree.
    """
    segments.expect("bias", bias, x.shape[-1:])
    rows = x.reshape(-1, x.shape[-1])
    if implementation(x) == "torch":
        y = _plain(rows, bias, into)
    else:
        y = _BiasGelu.apply(rows, bias, into, None if into is None else segments.anchor(x.device))
    return y.view(x.shape)


def _plain(x: Tensor, bias: Tensor, into: BiasGeluSink | None) -> Tensor:
    dtype = segments.statistics_dtype(x.dtype)
    if into is None:
        return reference(x.to(dtype), bias.to(dtype)).to(x.dtype)
    stores = [segments.store_in(into.dbias)]
    return segments.by_task(reference, (x.to(dtype),), (bias.to(dtype),), into.bounds, stores).to(x.dtype)


@kernel_op()
def bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """y [N, F]."""
    return torch.empty_like(x)


@kernel_op("dbias")
def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dbias: Tensor | None) -> Tensor:
    """dx [N, F]; writes each task's dbias [T, F]."""
    return torch.empty_like(x)


@kernel_op()
def bias_gelu_unfinished(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """dx [N, F], and partial sums of dbias (kernels/column_sums.py)."""
    from minbert_fast.kernels import bias_gelu as kernels

    partials = kernels.partition(*x.shape, x.device).partials(bounds.numel() - 1, 1, x.shape[1], x.device)
    return torch.empty_like(x), partials


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, into: BiasGeluSink | None, anchor: Tensor | None) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(x, bias)
        return bias_gelu_forward(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        if ctx.into and ctx.into.tape is not None:
            from minbert_fast.kernels import bias_gelu as kernels

            dx, partials = bias_gelu_unfinished(dy, x, bias, ctx.into.bounds)
            rows = kernels.partition(*x.shape, x.device).rows_per_program
            ctx.into.tape.sums(Unfinished(partials, rows, (ctx.into.dbias,)))
            return dx, None, None, None
        bounds, dbias = ctx.into[:2] if ctx.into else segments.one_task(x, bias)
        dx = bias_gelu_backward(dy, x, bias, bounds, dbias)
        return dx, None if ctx.into else dbias[0], None, None
