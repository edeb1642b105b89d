# SPDX-License-Identifier: Apache-2.0
"""y = LayerNorm(residual + dropout(x + bias)): the op after the attention and the feed-forward products of a layer.

Shapes: N token rows, H hidden, T tasks. Statistics are fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minbert_fast.ops import dropout, segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.grouped import Tape, Unfinished
from minbert_fast.ops.library import kernel_op


def reference(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, keep: Tensor | float = 1.0
) -> Tensor:
    """The op in plain PyTorch; `keep` [N, H] is the dropout factor of each element, 0 or 1 / (1 - p)."""
    return F.layer_norm(residual + (x + bias) * keep, gamma.shape, gamma, beta, eps)


class AddNormSink(NamedTuple):
    """Where the backward writes each task's parameter gradients; None for a frozen parameter."""

    bounds: Tensor  # [T + 1] int32, token rows of the tasks
    dgamma: Tensor | None = None  # [T, H], any task stride; overwritten, as those below
    dbeta: Tensor | None = None  # [T, H]
    dbias: Tensor | None = None  # [T, H]
    tape: Tape | None = None  # takes them for later; None: they are computed at once


def add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    p: float = 0.0, seed: Tensor | None = None, site: int = 0, into: AddNormSink | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm(residual + dropout(x + bias)) over the last dimension.

    x and residual [..., H] of one dtype; bias, gamma, beta [H] of that dtype or fp32. Dropout with probability p draws
    from (seed int64 [1], site). Differentiable once in all five tensors. With `into` (x [N, H]), parameters are constants
    for autograd, and each task's gradients of them go into the sink. Rows from bounds[T] on get no gradient and add to none.

    Raises ValueError if shapes or dtypes disagree, p is not in [0, 1), or p > 0 has no seed.
    """
    return add_norm_twice(x, bias, residual, gamma, beta, eps, p, seed, site, into)[0]


def add_norm_twice(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    p: float = 0.0, seed: Tensor | None = None, site: int = 0, into: AddNormSink | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result of `add_norm` under two names: one for the next product, one for the residual connection around it.

    The backward then gets the gradients of both, and adds them as it reads them; autograd would write their sum first.
    """
    width = x.shape[-1]
    segments.expect("residual", residual, x.shape, x.dtype)
    for name, vector in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        segments.expect(name, vector, (width,))
    dropout.check(p, seed)
    rows, other = x.reshape(-1, width), residual.reshape(-1, width)
    if implementation(x) == "torch":
        y = again = _plain(rows, bias, other, gamma, beta, eps, p, seed, site, into)
    else:
        anchor = None if into is None else segments.anchor(x.device)
        y, again = _AddNorm.apply(rows, bias, other, gamma, beta, eps, p, seed, site, into, anchor)
    return y.view(x.shape), again.view(x.shape)


def _plain(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    p: float, seed: Tensor | None, site: int, into: AddNormSink | None,
) -> Tensor:  # fmt: skip
    def formula(x: Tensor, residual: Tensor, keep: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor) -> Tensor:
        x, bias, residual, gamma, beta = (t.to(keep.dtype) for t in (x, bias, residual, gamma, beta))
        return reference(x, bias, residual, gamma, beta, eps, keep)

    rows, parameters = (x, residual, dropout.keep_rows(seed, site, len(x), x, p)), (gamma, beta, bias)
    if into is None:
        return formula(*rows, *parameters).to(x.dtype)
    stores = [segments.store_in(view) for view in into[1:4]]
    return segments.by_task(formula, rows, parameters, into.bounds, stores).to(x.dtype)


@kernel_op()
def add_norm_forward(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    p: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [N, H], mean [N], rstd [N]."""
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


@kernel_op("dgamma", "dbeta", "dbias")
def add_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, bounds: Tensor,
    p: float, seed: Tensor | None, site: int, dgamma: Tensor | None, dbeta: Tensor | None, dbias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx, dresidual [N, H]; writes each task's dgamma, dbeta, dbias [T, H]."""
    return torch.empty_like(x), torch.empty_like(x)


@kernel_op()
def add_norm_unfinished(
    dy: Tensor, more: Tensor | None, x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    bounds: Tensor, p: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual [N, H] for the gradient dy + more, and partial sums of dgamma, dbeta, dbias (kernels/column_sums.py)."""
    from minbert_fast.kernels import add_norm as kernels

    partials = kernels.partition(*x.shape, x.device).partials(bounds.numel() - 1, 3, x.shape[1], x.device)
    return torch.empty_like(x), torch.empty_like(x), partials


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float,
        p: float, seed: Tensor | None, site: int, into: AddNormSink | None, anchor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, mean, rstd = add_norm_forward(x, bias, residual, gamma, beta, eps, p, seed, site)
        ctx.p, ctx.site, ctx.into = p, site, into
        ctx.save_for_backward(x, bias, residual, gamma, mean, rstd, beta, seed)
        ctx.set_materialize_grads(False)  # a gradient that nobody computed stays None
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, more: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, beta, seed = ctx.saved_tensors
        x, bias, _, gamma, _, _ = saved
        if dy is None:
            dy, more = more, None
        if dy is None:
            return (None,) * 11
        if ctx.into and ctx.into.tape is not None:
            from minbert_fast.kernels import add_norm as kernels

            bounds, *gradients, tape = ctx.into
            dx, dresidual, partials = add_norm_unfinished(dy, more, *saved, bounds, ctx.p, seed, ctx.site)
            rows = kernels.partition(*x.shape, x.device).rows_per_program
            tape.sums(Unfinished(partials, rows, tuple(gradients)))
            return dx, None, dresidual, *(None,) * 8
        dy = dy if more is None else dy + more
        bounds, *gradients = ctx.into[:4] if ctx.into else segments.one_task(x, gamma, beta, bias)
        dx, dresidual = add_norm_backward(dy, *saved, bounds, ctx.p, seed, ctx.site, *gradients)
        dgamma, dbeta, dbias = (None,) * 3 if ctx.into else (gradient[0] for gradient in gradients)
        return dx, dbias, dresidual, dgamma, dbeta, *(None,) * 6
