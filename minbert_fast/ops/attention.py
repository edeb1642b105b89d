# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention within sentences, on packed rows and on rectangles with a mask.

Shapes: N rows, B sentences, S positions, h heads, d head width. lse is the log-sum-exp of each row's scores, fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minbert_fast.ops import segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native import layers


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """softmax(q k^T scale) v within each sentence ("Attention Is All You Need", eq. 1), differentiable once in qkv.

    qkv [N, 3, h, d]; sentence b owns rows cu_seqlens[b] to cu_seqlens[b + 1] (int32 [B + 1] on qkv's device);
    max_seqlen bounds every sentence's length. Probabilities are dropped with probability dropout_p by the mask of
    (seed int64 [1], site). Returns [N, h * d]; rows of no sentence are zero.

    Raises ValueError where shapes or dtypes disagree, or dropout_p is no probability below 1 or has no seed.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape [N, 3, heads, head_dim], not {list(qkv.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not cu_seqlens.numel():
        raise ValueError(f"cu_seqlens must be int32 [B + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    _check_dropout(dropout_p, seed)
    out: Tensor = _packed(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, site)[0]
    return out


def attention_dense(
    qkv: Tensor, mask: Tensor, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None, site: int = 0
) -> Tensor:
    """The same on a rectangle: qkv [B, S, 3, h, d], mask [B, S] (not zero: attended; padding anywhere) -> [B, S, h * d].

    Positions with mask 0 are not attended to and give zeros, as does a row without any attended position. Dropout sees
    the rectangle as B * S packed rows.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape [B, S, 3, heads, head_dim], not {list(qkv.shape)}")
    if mask.shape != qkv.shape[:2]:
        raise ValueError(f"mask must have shape {list(qkv.shape[:2])}, not {list(mask.shape)}")
    _check_dropout(dropout_p, seed)
    out: Tensor = _dense(qkv, mask, scale, dropout_p, seed, site)[0]
    return out


def _check_dropout(p: float, seed: Tensor | None) -> None:
    if not 0.0 <= p < 1.0 or (p > 0.0 and seed is None):
        raise ValueError(f"dropout needs 0 <= p < 1 and, where p > 0, a seed: p is {p}, seed is {seed}")


def _contiguous_rows(x: Tensor) -> Tensor:
    """x [N, ...] with every row contiguous; rows may lie any distance apart."""
    return x if not x.shape[0] or x[0].is_contiguous() else x.contiguous()


# ---- Packed rows ----------------------------------------------------------------------------------------------------


@custom_op("attention", mutates_args=())
def _packed(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, p: float, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    """out [N, h * d], lse [h, N]."""
    match implementation(qkv):
        case "triton":
            from minbert_fast.kernels import attention as kernels

            return kernels.attention_forward(qkv, cu_seqlens, max_seqlen, scale, p, seed, site)
        case "native":
            return layers.attention_forward(_contiguous_rows(qkv), cu_seqlens, scale, p, seed, site)
        case "torch":
            rows = _Rows(qkv.shape[0], cu_seqlens, max_seqlen)
            keep = _keep(rows.row, qkv, p, seed, site)
            out, lse = _rectangle_forward(rows.pad(qkv), rows.valid, scale, keep)
            return rows.unpad(out), rows.unpad(lse.transpose(1, 2)).T.contiguous()


@_packed.register_fake
def _(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, p: float, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    rows, _, heads, width = qkv.shape
    lse = qkv.new_empty(heads, rows, dtype=segments.statistics_dtype(qkv.dtype))
    return qkv.new_empty(rows, heads * width), lse


@custom_op("attention_backward", mutates_args=())
def _packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """dqkv [N, 3, h, d]."""
    match implementation(qkv):
        case "triton":
            from minbert_fast.kernels import attention as kernels

            return kernels.attention_backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, p, seed, site)
        case "native":
            dout, qkv = _contiguous_rows(dout), _contiguous_rows(qkv)
            return layers.attention_backward(dout, qkv, lse, cu_seqlens, scale, p, seed, site)
        case "torch":
            rows = _Rows(qkv.shape[0], cu_seqlens, max_seqlen)
            keep = _keep(rows.row, qkv, p, seed, site)
            padded_lse = rows.pad(lse.T).transpose(1, 2)
            dqkv = _rectangle_backward(rows.pad(dout), rows.pad(qkv), padded_lse, rows.valid, scale, keep)
            return rows.unpad(dqkv)


@_packed_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _packed_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.p, seed, ctx.site = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, seed)


def _packed_autograd(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    return _packed_backward(dout, *tensors, ctx.max_seqlen, ctx.scale, ctx.p, seed, ctx.site), *(None,) * 6


_packed.register_autograd(_packed_autograd, setup_context=_packed_context)


# ---- Rectangles -----------------------------------------------------------------------------------------------------


@custom_op("attention_dense", mutates_args=())
def _dense(qkv: Tensor, mask: Tensor, scale: float, p: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    """out [B, S, h * d], lse [h, B * S]."""
    match implementation(qkv):
        case "triton":
            from minbert_fast.kernels import attention as kernels

            return kernels.attention_dense_forward(qkv, mask, scale, p, seed, site)
        case "native":
            return layers.attention_dense_forward(qkv.contiguous(), mask, scale, p, seed, site)
        case "torch":
            keep = _keep(_dense_rows(mask), qkv, p, seed, site)
            out, lse = _rectangle_forward(qkv, mask != 0, scale, keep)
            return out, lse.transpose(0, 1).flatten(1).contiguous()


@_dense.register_fake
def _(qkv: Tensor, mask: Tensor, scale: float, p: float, seed: Tensor | None, site: int) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, width = qkv.shape
    lse = qkv.new_empty(heads, batch * length, dtype=segments.statistics_dtype(qkv.dtype))
    return qkv.new_empty(batch, length, heads * width), lse


@custom_op("attention_dense_backward", mutates_args=())
def _dense_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    """dqkv [B, S, 3, h, d]."""
    match implementation(qkv):
        case "triton":
            from minbert_fast.kernels import attention as kernels

            return kernels.attention_dense_backward(dout, qkv, out, lse, mask, scale, p, seed, site)
        case "native":
            dout, qkv = dout.contiguous(), qkv.contiguous()
            return layers.attention_dense_backward(dout, qkv, lse, mask, scale, p, seed, site)
        case "torch":
            keep = _keep(_dense_rows(mask), qkv, p, seed, site)
            padded_lse = lse.unflatten(1, mask.shape).transpose(0, 1)
            return _rectangle_backward(dout, qkv, padded_lse, mask != 0, scale, keep)


@_dense_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _dense_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, mask, ctx.scale, ctx.p, seed, ctx.site = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, mask, seed)


def _dense_autograd(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    return _dense_backward(dout, *tensors, ctx.scale, ctx.p, seed, ctx.site), *(None,) * 5


_dense.register_autograd(_dense_autograd, setup_context=_dense_context)


# ---- In plain PyTorch: every device, fp64 too, no question to the device --------------------------------------------


class _Rows:
    """Packed rows as a rectangle [B, S] and back."""

    def __init__(self, count: int, cu_seqlens: Tensor, max_seqlen: int) -> None:
        offsets = cu_seqlens.long()
        position = torch.arange(max_seqlen, device=offsets.device)
        self.valid = position < offsets.diff()[:, None]  # [B, S]
        self.row = torch.where(self.valid, offsets[:-1, None] + position, 0)  # [B, S]
        # Row r lies in the first sentence that ends behind it; rows behind the last sentence in none.
        rows = torch.arange(count, device=offsets.device)
        sentence = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        self._inside = sentence < self.valid.shape[0]  # [N]
        flat = sentence * max_seqlen + rows - offsets[sentence.clamp(max=max(0, self.valid.shape[0] - 1))]
        self._flat = torch.where(self._inside, flat, 0)  # [N] into B * S

    def pad(self, x: Tensor) -> Tensor:
        """x [N, ...] -> [B, S, ...], zeros where there is no token."""
        if not x.shape[0]:
            return x.new_zeros(*self.valid.shape, *x.shape[1:])
        return _zero_unless(self.valid, x[self.row])

    def unpad(self, x: Tensor) -> Tensor:
        """x [B, S, ...] -> [N, ...], zeros in rows of no sentence."""
        if not self.valid.numel():
            return x.new_zeros(len(self._flat), *x.shape[2:])
        return _zero_unless(self._inside, x.flatten(0, 1)[self._flat])


def _zero_unless(condition: Tensor, x: Tensor) -> Tensor:
    return torch.where(condition.reshape(*condition.shape, *(1,) * (x.dim() - condition.dim())), x, 0)


def _dense_rows(mask: Tensor) -> Tensor:
    return torch.arange(mask.numel(), device=mask.device).view(mask.shape)


def _keep(rows: Tensor, qkv: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor | None:
    """What dropout multiplies probabilities with [B, h, S, S], by the row numbers [B, S]; None without dropout."""
    if p == 0.0:
        return None
    assert seed is not None
    batch, length = rows.shape
    planes = [keep_mask(seed, site, rows.flatten(), length, p, head) for head in range(qkv.shape[-2])]
    return torch.stack(planes).view(-1, batch, length, length).transpose(0, 1)


def _rectangle_forward(qkv: Tensor, valid: Tensor, scale: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """qkv [B, S, 3, h, d], valid [B, S] -> out [B, S, h * d], lse [B, h, S]; zero where a row is not valid."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, S, d]
    pairs = (valid[:, :, None] & valid[:, None, :])[:, None]  # [B, 1, S, S]
    scores = (q @ k.transpose(2, 3)).to(segments.statistics_dtype(qkv.dtype)) * scale
    lse = torch.where(valid[:, None], scores.masked_fill(~pairs, float("-inf")).logsumexp(-1), 0)
    weights = torch.where(pairs, (scores - lse[..., None]).exp(), 0)
    if keep is not None:
        weights = weights * keep
    out = weights.to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2), lse


def _rectangle_backward(
    dout: Tensor, qkv: Tensor, lse: Tensor, valid: Tensor, scale: float, keep: Tensor | None
) -> Tensor:
    """dout [B, S, h * d], qkv [B, S, 3, h, d], lse [B, h, S] -> dqkv [B, S, 3, h, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    dout = dout.unflatten(2, qkv.shape[3:]).transpose(1, 2)  # [B, h, S, d]
    pairs = (valid[:, :, None] & valid[:, None, :])[:, None]
    scores = (q @ k.transpose(2, 3)).to(lse.dtype) * scale
    weights = torch.where(pairs, (scores - lse[..., None]).exp(), 0)
    kept = weights if keep is None else weights * keep
    product = kept * (dout @ v.transpose(2, 3)).to(lse.dtype)
    dscores = ((product - weights * product.sum(-1, keepdim=True)) * scale).to(qkv.dtype)
    dv = kept.to(qkv.dtype).transpose(2, 3) @ dout
    return torch.stack([dscores @ k, dscores.transpose(2, 3) @ q, dv]).permute(1, 3, 0, 2, 4).contiguous()
