# SPDX-License-Identifier: Apache-2.0
"""y = GELU(x + bias) in the erf form: what follows the first feed-forward product of a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minbert_fast.ops import segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native import layers


class BiasGeluSink(NamedTuple):
    """Where the backward writes each task's bias gradient; None when the bias is frozen."""

    bounds: Tensor  # [T + 1] int32, token rows of the tasks
    dbias: Tensor | None = None  # [T, F], any task stride; overwritten


def bias_gelu(x: Tensor, bias: Tensor, into: BiasGeluSink | None = None) -> Tensor:
    """GELU(x + bias) with the exact (erf) GELU; x [..., F], bias [F] of x's dtype or fp32.

    Differentiable once in both. With `into` (x [N, F]), the bias counts as a constant, its gradient goes into the sink
    apart by task, and rows from bounds[T] on get and give none. Raises ValueError where shapes disagree.
    """
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must have shape {list(x.shape[-1:])}, not {list(bias.shape)}")
    if into is not None:
        return _BiasGeluInto.apply(x, bias, into, segments.anchor(x.device))
    y: Tensor = _forward(x.reshape(-1, x.shape[-1]), bias)
    return y.view(x.shape)


@custom_op("bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    match implementation(x):
        case "triton":
            from minbert_fast.kernels import bias_gelu as kernels

            return kernels.bias_gelu_forward(x.contiguous(), bias)
        case "native":
            return layers.bias_gelu_forward(x.contiguous(), bias)
        case "torch":
            dtype = segments.statistics_dtype(x.dtype)
            return F.gelu(x.to(dtype) + bias.to(dtype)).to(x.dtype)


@_forward.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("bias_gelu_backward", mutates_args=("dbias",))
def _backward(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dbias: Tensor | None) -> Tensor:
    """dx [N, F]; writes each task's dbias [T, F]."""
    match implementation(x):
        case "triton":
            from minbert_fast.kernels import bias_gelu as kernels

            return kernels.bias_gelu_backward(dy.contiguous(), x.contiguous(), bias, bounds, dbias)
        case "native":
            return layers.bias_gelu_backward(dy.contiguous(), x.contiguous(), bias, bounds, dbias)
        case "torch":
            dtype = segments.statistics_dtype(x.dtype)
            dx = torch.ops.aten.gelu_backward(dy.to(dtype), x.to(dtype) + bias.to(dtype))
            tasks = segments.segments(bounds)
            if dbias is not None:
                for task, (begin, end) in enumerate(tasks):
                    dbias[task] = dx[begin:end].sum(0)
            dx[tasks[-1][1] :] = 0
            return dx.to(x.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dbias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, bias = ctx.saved_tensors
    dbias = bias.new_empty(1, *bias.shape)
    dx = _backward(dy, x, bias, segments.one_segment(x.shape[0], x.device), dbias)
    return dx, dbias[0]


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _BiasGeluInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, into: BiasGeluSink, anchor: Tensor) -> Tensor:
        ctx.into = into
        ctx.save_for_backward(x, bias)
        return _forward(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(dy, *ctx.saved_tensors, *ctx.into), None, None, None
