# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention within the sentences of a packed batch, or of a rectangle with padding anywhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minbert_fast.functional import segments
from minbert_fast.functional.backend import implementation
from minbert_fast.functional.dropout import keep_mask


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """softmax(q k^T scale) v within each sentence, probabilities dropped with probability dropout_p.

    qkv [N, 3, h, d], cu_seqlens int32 [B + 1], max_seqlen a bound on the sentences' lengths. Dropout draws from
    (seed int64 [1], site). Returns [N, h * d]; rows of no sentence are zero. Differentiable once in qkv.

    Raises ValueError where shapes or dtypes disagree, or dropout_p is no probability below 1 or has no seed.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape [N, 3, heads, head_dim], not {list(qkv.shape)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32 [B + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    _check_dropout(dropout_p, seed)
    out: Tensor = _forward(qkv, cu_seqlens, max_seqlen, None, scale, dropout_p, seed, site)[0]
    return out


def attention_dense(
    qkv: Tensor, mask: Tensor, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None, site: int = 0
) -> Tensor:
    """The same on a rectangle: qkv [B, S, 3, h, d], mask [B, S], nonzero where a position is attended, anywhere.

    Returns [B, S, h * d]; queries with mask 0, and rows that attend to nothing, give zeros. Shapes are static and
    the device is asked nothing. Raises ValueError like `attention`.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3 or mask.shape != qkv.shape[:2]:
        raise ValueError(f"qkv [B, S, 3, heads, head_dim] and mask [B, S], not {list(qkv.shape)}, {list(mask.shape)}")
    _check_dropout(dropout_p, seed)
    batch, length = mask.shape
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device) * length
    attended = (mask != 0).flatten()
    out: Tensor = _forward(qkv.flatten(0, 1), offsets, length, attended, scale, dropout_p, seed, site)[0]
    return out.unflatten(0, (batch, length))


def _check_dropout(p: float, seed: Tensor | None) -> None:
    if not 0.0 <= p < 1.0 or (p > 0.0 and seed is None):
        raise ValueError(f"dropout needs 0 <= p < 1 and, where p > 0, a seed: p is {p}, seed is {seed}")


@torch.library.custom_op("minbert_fast::attention", mutates_args=())
def _forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mask: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """out [N, h * d] and the log-sum-exp [h, N]; mask [N] bool leaves single rows out."""
    match implementation(qkv):
        case "triton":
            from minbert_fast.kernels import attention as kernels

            return kernels.attention_forward(qkv, cu_seqlens, max_seqlen, scale, p, seed, site, mask)
        case "native" | "torch":
            with torch.autocast(qkv.device.type, enabled=False):
                return _attend(qkv, cu_seqlens, max_seqlen, mask, scale, p, seed, site)


@_forward.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mask: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    rows, _, heads, width = qkv.shape
    lse = qkv.new_empty(heads, rows, dtype=segments.statistics_dtype(qkv.dtype))
    return qkv.new_empty(rows, heads * width), lse


@torch.library.custom_op("minbert_fast::attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mask: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """dqkv [N, 3, h, d]."""
    match implementation(qkv):
        case "triton":
            from minbert_fast.kernels import attention as kernels

            return kernels.attention_backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, p, seed, site, mask)
        case "native" | "torch":
            with torch.autocast(qkv.device.type, enabled=False):
                return _attend_backward(dout, qkv, cu_seqlens, max_seqlen, mask, scale, p, seed, site)


@_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mask: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, mask, ctx.scale, ctx.p, seed, ctx.site = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, mask, seed)


def _autograd(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, out, lse, cu_seqlens, mask, seed = ctx.saved_tensors
    dqkv = _backward(dout, qkv, out, lse, cu_seqlens, ctx.max_seqlen, mask, ctx.scale, ctx.p, seed, ctx.site)
    return dqkv, *(None,) * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _Rectangle(NamedTuple):
    """A packed batch gathered into [B, S], in the dtype of statistics."""

    row: Tensor  # [B, S] the packed row of each position
    attended: Tensor  # [B, S] bool
    q: Tensor  # [B, h, S, d], k and v alike
    k: Tensor
    v: Tensor
    scores: Tensor  # [B, h, S, S], minus infinity for keys that nothing attends to
    keep: Tensor | None  # [B, h, S, S] what dropout multiplies probabilities with


def _rectangle(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mask: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> _Rectangle:
    heads = qkv.shape[2]
    place = cu_seqlens[:-1].long()[:, None] + torch.arange(max_seqlen, device=qkv.device)
    attended = place < cu_seqlens[1:, None]
    row = place.clamp(max=len(qkv) - 1)
    if mask is not None:
        attended = attended & mask[row]
    # Zeros outside each sentence, not whatever stands in the next one: a NaN there must not spread.
    own = torch.where(attended[:, :, None, None, None], qkv[row].to(segments.statistics_dtype(qkv.dtype)), 0)
    q, k, v = (t.transpose(1, 2) for t in own.unbind(2))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~attended[:, None, None, :], float("-inf"))
    scores = scores.masked_fill(~attended.any(1)[:, None, None, None], 0.0)
    keep = None
    if p > 0.0:
        assert seed is not None
        masks = [keep_mask(seed, site, row.flatten(), max_seqlen, p, plane=head) for head in range(heads)]
        keep = torch.stack(masks).view(heads, *row.shape, max_seqlen).transpose(0, 1).to(q.dtype)
    return _Rectangle(row, attended, q, k, v, scores, keep)


def _attend(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mask: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """The forward in plain PyTorch: sentences gathered into a rectangle, masked, and scattered back."""
    rows, _, heads, width = qkv.shape
    out = qkv.new_zeros(rows, heads * width)
    lse = qkv.new_zeros(heads, rows, dtype=segments.statistics_dtype(qkv.dtype))
    if not (rows and max_seqlen and cu_seqlens.numel() > 1):
        return out, lse
    at = _rectangle(qkv, cu_seqlens, max_seqlen, mask, scale, p, seed, site)
    probabilities = at.scores.softmax(-1)
    dropped = probabilities if at.keep is None else probabilities * at.keep
    context = (dropped @ at.v).transpose(1, 2).flatten(2)  # [B, S, h d]
    target = at.row[at.attended]
    out[target] = context[at.attended].to(out.dtype)
    lse[:, target] = at.scores.logsumexp(-1).transpose(0, 1)[:, at.attended]
    return out, lse


def _attend_backward(
    dout: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    mask: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """The backward in plain PyTorch; probabilities are computed again."""
    dqkv = torch.zeros(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if not (len(qkv) and max_seqlen and cu_seqlens.numel() > 1):
        return dqkv
    at = _rectangle(qkv, cu_seqlens, max_seqlen, mask, scale, p, seed, site)
    do = dout[at.row].unflatten(-1, qkv.shape[2:]).transpose(1, 2).to(at.q.dtype)  # [B, h, S, d]
    do = torch.where(at.attended[:, None, :, None], do, 0)
    probabilities = at.scores.softmax(-1)
    dropped = probabilities if at.keep is None else probabilities * at.keep
    dv = dropped.transpose(2, 3) @ do
    dp = do @ at.v.transpose(2, 3)
    dp = dp if at.keep is None else dp * at.keep
    ds = probabilities * (dp - (dp * probabilities).sum(-1, keepdim=True)) * scale
    stacked = torch.stack((ds @ at.k, ds.transpose(2, 3) @ at.q, dv))  # [3, B, h, S, d]
    dqkv[at.row[at.attended]] = stacked.permute(1, 3, 0, 2, 4)[at.attended].to(dqkv.dtype)
    return dqkv
