# SPDX-License-Identifier: Apache-2.0
"""One encoder layer as one node of autograd, forward and backward, for code that runs without graphs.

It strings the ops of this room together by hand. With a node for each op and each product, forward and backward of a small
batch take half as long again, on the host.

Shapes: N token rows, H hidden, F intermediate, h heads, d = H / h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minbert_fast.ops.add_norm import add_norm_backward, add_norm_forward
from minbert_fast.ops.add_norm import reference as add_norm
from minbert_fast.ops.attention import attention_backward, attention_forward
from minbert_fast.ops.attention import reference as attention
from minbert_fast.ops.bias_gelu import bias_gelu_backward, bias_gelu_forward
from minbert_fast.ops.bias_gelu import reference as bias_gelu

Dropout = tuple[float, Tensor | None, int]  # p, seed int64 [1] (None: p is 0), site


class LayerWeights(NamedTuple):
    """The parameters of a layer, all of the activations' dtype."""

    query: Tensor  # [H, H], as the two below
    key: Tensor
    value: Tensor
    query_bias: Tensor  # [H], as the two below
    key_bias: Tensor
    value_bias: Tensor
    dense: Tensor  # [H, H]
    dense_bias: Tensor  # [H], as the two below
    gamma: Tensor
    beta: Tensor
    interm: Tensor  # [F, H]
    interm_bias: Tensor  # [F]
    out: Tensor  # [H, F]
    out_bias: Tensor  # [H], as the two below
    out_gamma: Tensor
    out_beta: Tensor


class LayerSettings(NamedTuple):
    """A layer's settings, and its tensors that take no gradients."""

    heads: int
    eps: tuple[float, float]  # of the two LayerNorms
    dropouts: tuple[Dropout, Dropout, Dropout]  # of the probabilities, behind attention, behind the feed-forward part
    sentences: tuple[Tensor | None, Tensor | None, int]  # cu_seqlens, mask and max_seqlen as for attention_forward
    bounds: Tensor  # [0, N] int32: all rows are one task


def reference(
    hidden: Tensor, w: LayerWeights, attended: Tensor, heads: int, eps: tuple[float, float],
    keep: Sequence[Tensor | float] = (1.0, 1.0, 1.0),
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch on a rectangle: hidden [B, S, H], attended [B, S] bool -> [B, S, H].

    `keep` are the dropout factors of the probabilities [B, h, S, S], behind attention and behind the feed-forward part.
    """
    qkv = F.linear(hidden, torch.cat(w[:3]), torch.cat(w[3:6])).unflatten(2, (3, heads, -1))
    context, _ = attention(qkv, attended, 1.0 / math.sqrt(qkv.shape[-1]), keep[0])
    branch = F.linear(context, w.dense)
    middle = add_norm(branch, w.dense_bias, hidden, w.gamma, w.beta, eps[0], keep[1])
    inner = bias_gelu(F.linear(middle, w.interm), w.interm_bias)
    return add_norm(F.linear(inner, w.out), w.out_bias, middle, w.out_gamma, w.out_beta, eps[1], keep[2])


def encoder_layer(hidden: Tensor, weights: LayerWeights, settings: LayerSettings) -> Tensor:
    """hidden [N, H] through a layer -> [N, H], differentiable once in hidden and in the weights.

    The caller has checked shapes. The result is that of the ops one after the other, to the bit.
    """
    if not torch.is_grad_enabled():
        return _forward(hidden, weights, settings)[-1]
    out: Tensor = _Layer.apply(settings, hidden, *weights)
    return out


def _forward(hidden: Tensor, w: LayerWeights, settings: LayerSettings) -> tuple[Tensor, ...]:
    """The tensors that the backward needs, in the order in which it unpacks them, then the layer's output [N, H]."""
    heads, (eps, out_eps), (p_dropout, dropout, out_dropout), sentences, _ = settings
    qkv_weight = torch.cat(w[:3])  # [3H, H]
    qkv = F.linear(hidden, qkv_weight, torch.cat(w[3:6])).unflatten(1, (3, heads, -1))  # [N, 3, h, d]
    context, lse = attention_forward(qkv, *sentences, 1.0 / math.sqrt(qkv.shape[-1]), *p_dropout)  # [N, H]
    branch = F.linear(context, w.dense)  # [N, H]
    middle, *statistics = add_norm_forward(branch, w.dense_bias, hidden, w.gamma, w.beta, eps, *dropout)
    wide = F.linear(middle, w.interm)  # [N, F]
    inner = bias_gelu_forward(wide, w.interm_bias)
    last = F.linear(inner, w.out)  # [N, H]
    y, *out_statistics = add_norm_forward(last, w.out_bias, middle, w.out_gamma, w.out_beta, out_eps, *out_dropout)
    return qkv_weight, qkv, context, lse, branch, middle, *statistics, wide, inner, last, *out_statistics, y


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: LayerSettings, hidden: Tensor, *weights: Tensor) -> Tensor:
        w = LayerWeights(*weights)
        *kept, y = _forward(hidden, w, settings)
        used = (w.dense, w.dense_bias, w.gamma, w.interm, w.interm_bias, w.out, w.out_bias, w.out_gamma)
        ctx.settings = settings
        ctx.save_for_backward(hidden, *used, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, dense, dense_bias, gamma, interm, interm_bias, out, out_bias, out_gamma, *kept = ctx.saved_tensors
        qkv_weight, qkv, context, lse, branch, middle, mean, rstd, wide, inner, last, out_mean, out_rstd = kept
        _, _, (p_dropout, dropout, out_dropout), sentences, bounds = ctx.settings
        wanted: Any = LayerWeights(*ctx.needs_input_grad[2:])  # bools

        def product(dy: Tensor, x: Tensor, wanted: bool) -> Tensor | None:
            """The gradient [O, I] of a weight, unless it is frozen."""
            return dy.T @ x if wanted else None

        vectors = hidden.new_empty(6, hidden.shape[1])
        d_beside = vectors[:, None].unbind()  # [1, H] each
        d_interm_bias = wide.new_empty(1, wide.shape[1])
        d_last, d_middle = add_norm_backward(
            dy, last, out_bias, middle, out_gamma, out_mean, out_rstd, bounds, *out_dropout, *d_beside[:3]
        )
        d_wide = bias_gelu_backward(d_last @ out, wide, interm_bias, bounds, d_interm_bias)
        d_middle = torch.addmm(d_middle, d_wide, interm)
        d_branch, d_hidden = add_norm_backward(
            d_middle, branch, dense_bias, hidden, gamma, mean, rstd, bounds, *dropout, *d_beside[3:]
        )
        scale = 1.0 / math.sqrt(qkv.shape[-1])
        d_qkv = attention_backward(d_branch @ dense, qkv, context, lse, *sentences, scale, *p_dropout).flatten(1)
        d_projections = product(d_qkv, hidden, any(wanted[:3]))
        d_out_gamma, d_out_beta, d_out_bias, d_gamma, d_beta, d_dense_bias = vectors.unbind()
        return (
            None,
            torch.addmm(d_hidden, d_qkv, qkv_weight) if ctx.needs_input_grad[1] else None,
            *((None,) * 3 if d_projections is None else d_projections.chunk(3)),
            *d_qkv.sum(0).chunk(3),
            *(product(d_branch, context, wanted.dense), d_dense_bias, d_gamma, d_beta),
            *(product(d_wide, middle, wanted.interm), d_interm_bias[0]),
            *(product(d_last, inner, wanted.out), d_out_bias, d_out_gamma, d_out_beta),
        )
