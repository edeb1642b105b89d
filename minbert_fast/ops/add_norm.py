# SPDX-License-Identifier: Apache-2.0
"""y = LayerNorm(residual + dropout(x + bias)): what follows the attention and the feed-forward products of a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minbert_fast.ops import segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native import layers


class AddNormSink(NamedTuple):
    """Where the backward writes each task's parameter gradients; None for a frozen parameter."""

    bounds: Tensor  # [T + 1] int32, token rows of the tasks
    dgamma: Tensor | None = None  # [T, H], any task stride; overwritten, as those below
    dbeta: Tensor | None = None  # [T, H]
    dbias: Tensor | None = None  # [T, H]


def add_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    into: AddNormSink | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the last dimension, statistics in fp32.

    x and residual [..., H] of one dtype; bias, gamma, beta [H] of that dtype or fp32. Dropout with probability p draws
    from (seed int64 [1], site). Differentiable once in all five tensors. With `into` (x [N, H]), parameters count as
    constants, their gradients go into the sink apart by task, and rows from bounds[T] on get and give none.

    Raises ValueError where shapes or dtypes disagree, or p is no probability below 1 or has no seed.
    """
    width = x.shape[-1]
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual {residual.dtype} {list(residual.shape)} does not match x {x.dtype} {list(x.shape)}")
    for name, vector in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if vector.shape != (width,):
            raise ValueError(f"{name} must have shape [{width}], not {list(vector.shape)}")
    if not 0.0 <= p < 1.0 or (p > 0.0 and seed is None):
        raise ValueError(f"dropout needs 0 <= p < 1 and, where p > 0, a seed: p is {p}, seed is {seed}")
    if into is not None:
        return _AddNormInto.apply(x, bias, residual, gamma, beta, eps, p, seed, site, into, segments.anchor(x.device))
    y: Tensor = _forward(x.reshape(-1, width), bias, residual.reshape(-1, width), gamma, beta, eps, p, seed, site)[0]
    return y.view(x.shape)


@custom_op("add_norm", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, H], mean [N], rstd [N]."""
    match implementation(x):
        case "triton":
            from minbert_fast.kernels import add_norm as kernels

            return kernels.add_norm_forward(
                x.contiguous(), bias, residual.contiguous(), gamma, beta, eps, p, seed, site
            )
        case "native":
            return layers.add_norm_forward(x.contiguous(), bias, residual.contiguous(), gamma, beta, eps, p, seed, site)
        case "torch":
            z = _before_norm(x, bias, residual, p, seed, site)[0]
            y, mean, rstd = torch.native_layer_norm(z, gamma.shape, gamma.to(z.dtype), beta.to(z.dtype), eps)
            return y.to(x.dtype), mean.squeeze(-1), rstd.squeeze(-1)


@_forward.register_fake
def _(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=segments.statistics_dtype(x.dtype))
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@custom_op("add_norm_backward", mutates_args=("dgamma", "dbeta", "dbias"))
def _backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx, dresidual [N, H]; writes each task's dgamma, dbeta, dbias [T, H]."""
    match implementation(x):
        case "triton":
            from minbert_fast.kernels import add_norm as kernels

            return kernels.add_norm_backward(
                dy.contiguous(),
                x.contiguous(),
                bias,
                residual.contiguous(),
                gamma,
                mean,
                rstd,
                bounds,
                p,
                seed,
                site,
                dgamma,
                dbeta,
                dbias,
            )
        case "native":
            return layers.add_norm_backward(
                dy.contiguous(),
                x.contiguous(),
                bias,
                residual.contiguous(),
                gamma,
                mean,
                rstd,
                bounds,
                p,
                seed,
                site,
                dgamma,
                dbeta,
                dbias,
            )
        case "torch":
            z, keep = _before_norm(x, bias, residual, p, seed, site)
            dz = norm_backward(dy, z, gamma, mean, rstd, bounds, dgamma, dbeta)
            dx = dz if keep is None else dz * keep
            if dbias is not None:
                for task, (begin, end) in enumerate(segments.segments(bounds)):
                    dbias[task] = dx[begin:end].sum(0)
            return dx.to(x.dtype), dz.to(residual.dtype, copy=dx is dz)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    dbias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, bias, residual, gamma, beta, _, ctx.p, seed, ctx.site = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.beta_dtype = beta.dtype
    ctx.save_for_backward(x, bias, residual, gamma, mean, rstd, seed)


def _autograd(ctx: Any, dy: Tensor, dmean: Tensor | None, drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, bias, residual, gamma, mean, rstd, seed = ctx.saved_tensors
    dgamma, dbias = gamma.new_empty(1, *gamma.shape), bias.new_empty(1, *bias.shape)
    dbeta = torch.empty_like(dgamma, dtype=ctx.beta_dtype)
    bounds = segments.one_segment(x.shape[0], x.device)
    dx, dresidual = _backward(
        dy, x, bias, residual, gamma, mean, rstd, bounds, ctx.p, seed, ctx.site, dgamma, dbeta, dbias
    )
    return dx, dbias[0], dresidual, dgamma[0], dbeta[0], None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _AddNormInto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        p: float,
        seed: Tensor | None,
        site: int,
        into: AddNormSink,
        anchor: Tensor,
    ) -> Tensor:
        y, mean, rstd = _forward(x, bias, residual, gamma, beta, eps, p, seed, site)
        ctx.p, ctx.site, ctx.into = p, site, into
        ctx.save_for_backward(x, bias, residual, gamma, mean, rstd, seed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        bounds, dgamma, dbeta, dbias = ctx.into
        *tensors, seed = ctx.saved_tensors
        dx, dresidual = _backward(dy, *tensors, bounds, ctx.p, seed, ctx.site, dgamma, dbeta, dbias)
        return dx, None, dresidual, *(None,) * 8


def _before_norm(
    x: Tensor, bias: Tensor, residual: Tensor, p: float, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor | None]:
    """The sum that is normalised, and what dropout multiplied (None: no dropout), in the dtype of statistics."""
    dtype = segments.statistics_dtype(x.dtype)
    branch, keep = x.to(dtype) + bias.to(dtype), None
    if p > 0.0:
        assert seed is not None
        keep = keep_mask(seed, site, torch.arange(len(x), device=x.device), x.shape[1], p).to(dtype)
        branch = branch * keep
    return residual.to(dtype) + branch, keep


def norm_backward(
    dy: Tensor,
    z: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
) -> Tensor:
    """LayerNorm's backward in plain PyTorch: dz [N, H], zero from bounds[T] on; writes dgamma, dbeta [T, H] by task."""
    dz = torch.zeros_like(z)
    gamma = gamma.to(z.dtype)
    for task, (begin, end) in enumerate(segments.segments(bounds)):
        rows = slice(begin, end)
        dz[rows], scale, shift = torch.ops.aten.native_layer_norm_backward(
            dy[rows].to(z.dtype),
            z[rows],
            gamma.shape,
            mean[rows, None],
            rstd[rows, None],
            gamma,
            gamma,
            [True, dgamma is not None, dbeta is not None],
        )
        if dgamma is not None:
            dgamma[task] = scale
        if dbeta is not None:
            dbeta[task] = shift
    return dz
