# SPDX-License-Identifier: Apache-2.0
"""From packed tokens to one vector a sentence: mean, first token or maximum. Triton's kernels on a GPU, else PyTorch.

The backward is a gather in every mode: each token row reads its sentence's gradient. No two programs add to one address,
so every run gives the same bits. No value is read from the device.

Shapes: N token rows, B sentences, H hidden, S the longest sentence.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import kernel_op

Mode = Literal["mean", "cls", "max"]


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: Mode) -> Tensor:
    """One vector a sentence: hidden [N, H], cu_seqlens [B + 1] int32 -> [B, H], fp32 (fp64 for fp64 input).

    Sentence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]. Empty sentences give zeros; rows of no sentence neither
    count nor receive a gradient. Of equal maxima the first row gets the gradient. Raises ValueError for another mode.
    """
    if mode not in ("mean", "cls", "max"):
        raise ValueError(f"pooling mode {mode!r}: expected mean, cls or max")
    function = _Kernels if implementation(hidden) == "triton" else _Plain
    pooled: Tensor = function.apply(hidden, cu_seqlens, mode)
    return pooled


@kernel_op()
def pooling_forward(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """pooled [B, H] fp32, and the row of each maximum [B, H] int32 (of other modes: empty)."""
    pooled = hidden.new_empty(cu_seqlens.shape[0] - 1, hidden.shape[1], dtype=torch.float32)
    return pooled, pooled.new_empty(pooled.shape if mode == "max" else 0, dtype=torch.int32)


@kernel_op()
def pooling_backward(
    dpooled: Tensor, cu_seqlens: Tensor, chosen: Tensor, mode: str, rows: int, dtype: torch.dtype
) -> Tensor:
    """dhidden [rows, H] of `dtype`."""
    return dpooled.new_empty(rows, dpooled.shape[1], dtype=dtype)


class _Kernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cu_seqlens: Tensor, mode: Mode) -> Tensor:
        pooled, chosen = pooling_forward(hidden, cu_seqlens, mode)
        ctx.save_for_backward(cu_seqlens, chosen)
        ctx.rest = mode, hidden.shape[0], hidden.dtype
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dpooled: Tensor) -> tuple[Tensor, None, None]:
        return pooling_backward(dpooled, *ctx.saved_tensors, *ctx.rest), None, None


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, cu_seqlens: Tensor, mode: Mode) -> Tensor:
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        first, empty = cu_seqlens[:-1], (cu_seqlens[1:] == cu_seqlens[:-1])[:, None]
        argmax = None
        if hidden.shape[0] == 0 or first.shape[0] == 0:  # no rows, or no sentences
            pooled = x.new_zeros(first.shape[0], hidden.shape[1])
        elif mode == "mean":
            lengths = cu_seqlens.diff().clamp(min=1)[:, None]
            pooled = _reduce(x, cu_seqlens, "sum") / lengths
        elif mode == "cls":
            # An empty sentence at the end begins one past the last row.
            pooled = x[first.clamp(max=hidden.shape[0] - 1)].masked_fill(empty, 0.0)
        else:
            pooled = _reduce(x, cu_seqlens, "max").masked_fill(empty, 0.0)
            row = torch.arange(hidden.shape[0], device=hidden.device, dtype=torch.float64)[:, None]
            candidates = torch.where(x == pooled[_sentence_of_row(cu_seqlens, len(x))], row, torch.inf)
            argmax = _reduce(candidates, cu_seqlens, "min")  # [B, H] first row that holds the maximum
        ctx.save_for_backward(cu_seqlens, argmax)
        ctx.mode, ctx.shape, ctx.dtype = mode, hidden.shape, hidden.dtype
        return pooled

    @staticmethod
    def backward(ctx: Any, dpooled: Tensor) -> tuple[Tensor, None, None]:
        cu_seqlens, argmax = ctx.saved_tensors
        rows = ctx.shape[0]
        if cu_seqlens.shape[0] == 1 or rows == 0:
            return dpooled.new_zeros(ctx.shape, dtype=ctx.dtype), None, None
        row = torch.arange(rows, device=dpooled.device)
        sentence = _sentence_of_row(cu_seqlens, rows)
        if ctx.mode == "mean":
            dpooled = dpooled / cu_seqlens.diff().clamp(min=1)[:, None]
        dhidden = dpooled[sentence]
        owned = ((row >= cu_seqlens[0]) & (row < cu_seqlens[-1]))[:, None]
        if ctx.mode == "cls":
            owned = owned & (row == cu_seqlens[sentence])[:, None]
        elif ctx.mode == "max":
            owned = owned & (row[:, None] == argmax[sentence])
        return dhidden.masked_fill(~owned, 0.0).to(ctx.dtype), None, None


def _sentence_of_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The sentence of each row [rows]. Rows of no sentence get the first or the last one; callers mask them."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True).clamp(max=cu_seqlens.shape[0] - 2)


def _reduce(x: Tensor, cu_seqlens: Tensor, how: str) -> Tensor:
    initial = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}[how]
    # `unsafe` leaves out a check of the offsets that would wait for the device.
    return torch.segment_reduce(x, how, offsets=cu_seqlens, axis=0, initial=initial, unsafe=True)
