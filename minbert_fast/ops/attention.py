# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention within sentences, on packed rows and on rectangles with a mask.

Shapes: N rows, B sentences, S positions, h heads, d head width. lse is the log-sum-exp of each row's scores, fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minbert_fast.ops import dropout, segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import kernel_op


def reference(qkv: Tensor, attended: Tensor, scale: float, keep: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v in plain PyTorch ("Attention Is All You Need", eq. 1): out [B, S, h * d], lse [B, h, S].

    qkv [B, S, 3, h, d]. Positions where `attended` [B, S] is false are not attended to and give zeros. `keep`
    [B, h, S, S] are the dropout factors of the probabilities, 0 or 1 / (1 - p).
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, S, d]
    scores = (q @ k.transpose(2, 3)).to(segments.statistics_dtype(qkv.dtype)) * scale
    scores = scores.masked_fill(~attended[:, None, None, :], torch.finfo(scores.dtype).min)
    weights = (scores.softmax(-1) * keep).to(v.dtype)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out.masked_fill(~attended[..., None], 0.0), scores.logsumexp(-1).masked_fill(~attended[:, None], 0.0)


def attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None, site: int = 0,
) -> Tensor:  # fmt: skip
    """softmax(q k^T scale) v within each sentence, differentiable once in qkv.

    qkv [N, 3, h, d]; sentence b owns rows cu_seqlens[b] to cu_seqlens[b + 1] (int32 [B + 1] on qkv's device);
    max_seqlen bounds every sentence's length. Probabilities are dropped with probability dropout_p by the mask of
    (seed int64 [1], site). Returns [N, h * d]; rows of no sentence are zero.

    Raises ValueError if shapes or dtypes disagree, dropout_p is not in [0, 1), or dropout_p > 0 has no seed.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:]:
        raise ValueError(
            f"qkv must have shape [N, 3, heads, head_dim], heads and head_dim not 0, not {list(qkv.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not cu_seqlens.numel():
        raise ValueError(f"cu_seqlens must be int32 [B + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    dropout.check(dropout_p, seed)
    if implementation(qkv) != "torch":
        return _Attention.apply(qkv, cu_seqlens, None, max_seqlen, scale, dropout_p, seed, site)
    position, count = torch.arange(max_seqlen, device=qkv.device), int(cu_seqlens[-1])
    inside = position < cu_seqlens.diff()[:, None]  # [B, S]
    rectangle = qkv.new_zeros(*inside.shape, *qkv.shape[1:])
    rectangle[inside] = qkv[:count]
    keep = _keep(cu_seqlens[:-1, None] + position, qkv, dropout_p, seed, site)
    return F.pad(reference(rectangle, inside, scale, keep)[0][inside], (0, 0, 0, len(qkv) - count))


def attention_dense(
    qkv: Tensor, mask: Tensor, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None, site: int = 0
) -> Tensor:
    """The same on a rectangle: qkv [B, S, 3, h, d], mask [B, S] (not zero: attended; padding anywhere) -> [B, S, h * d].

    Positions with mask 0 are not attended to and give zeros, as does a row without any attended position. Dropout sees
    the rectangle as B * S packed rows.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        wanted = "[B, S, 3, heads, head_dim], heads and head_dim not 0"
        raise ValueError(f"qkv must have shape {wanted}, not {list(qkv.shape)}")
    segments.expect("mask", mask, qkv.shape[:2])
    dropout.check(dropout_p, seed)
    batch, length = mask.shape
    if implementation(qkv) != "torch":
        out = _Attention.apply(qkv.flatten(0, 1), None, mask != 0, length, scale, dropout_p, seed, site)
        return out.view(batch, length, out.shape[1])  # -1 is ambiguous where there are no rows
    rows = torch.arange(batch * length, device=qkv.device).view(batch, length)
    return reference(qkv, mask != 0, scale, _keep(rows, qkv, dropout_p, seed, site))[0]


def _keep(rows: Tensor, qkv: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor | float:
    """The dropout factors of the probabilities [B, h, S, S]; `rows` [B, S] are the row numbers of the queries."""
    if p == 0.0:
        return 1.0
    assert seed is not None
    heads, length = qkv.shape[-2], rows.shape[1]
    planes = [dropout.keep_mask(seed, site, rows.flatten(), length, p, head) for head in range(heads)]
    return torch.stack(planes).unflatten(1, rows.shape).transpose(0, 1)


@kernel_op()
def attention_forward(
    qkv: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, max_seqlen: int, scale: float,
    p: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [N, h * d], lse [h, N]; sentences by cu_seqlens, or the rows of a rectangle by mask [B, S] bool."""
    rows, _, heads, width = qkv.shape
    return qkv.new_empty(rows, heads * width), qkv.new_empty(heads, rows, dtype=torch.float32)


@kernel_op()
def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None,
    max_seqlen: int, scale: float, p: float, seed: Tensor | None, site: int,
) -> Tensor:  # fmt: skip
    """dqkv [N, 3, h, d]."""
    return qkv.new_empty(qkv.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, max_seqlen: int, scale: float,
        p: float, seed: Tensor | None, site: int,
    ) -> Tensor:  # fmt: skip
        out, lse = attention_forward(qkv, cu_seqlens, mask, max_seqlen, scale, p, seed, site)
        ctx.max_seqlen, ctx.scale, ctx.p, ctx.site = max_seqlen, scale, p, site
        ctx.save_for_backward(qkv, out, lse, cu_seqlens, mask, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *saved, seed = ctx.saved_tensors
        dqkv = attention_backward(dout, *saved, ctx.max_seqlen, ctx.scale, ctx.p, seed, ctx.site)
        return dqkv, *(None,) * 7
