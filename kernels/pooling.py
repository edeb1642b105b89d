# SPDX-License-Identifier: Apache-2.0
"""One vector a sentence from packed token rows: mean, first row or maximum, and the gradient of every row.

Forward, a program owns columns of one sentence and walks down its rows. Backward, a program owns a tile of rows, finds their
sentences by bisection, and writes each row once, padding too: one launch in each direction, without an atomic.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import cdiv
from minbert_fast.kernels.launches import Launch, meta

#: A program's tile: most sentences have up to 32 rows.
COLUMNS = 128
FORWARD_ROWS, BACKWARD_ROWS = 32, 16
_LAUNCH = {"COLUMNS": COLUMNS, "num_warps": 4, "enable_fp_fusion": True}
_NO_ROW = tl.constexpr(2147483647)


@triton.jit
def _pooling_forward(
    hidden_ptr,  # [rows, WIDTH]
    cu_seqlens_ptr,  # [sentences + 1] int32
    pooled_ptr,  # [sentences, WIDTH] fp32
    chosen_ptr,  # [sentences, WIDTH] int32: the row of each maximum
    MODE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sentence = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < WIDTH
    begin = tl.load(cu_seqlens_ptr + sentence)
    end = tl.load(cu_seqlens_ptr + sentence + 1)
    out = sentence.to(tl.int64) * WIDTH + columns
    if MODE == "cls":
        first = hidden_ptr + begin.to(tl.int64) * WIDTH + columns
        pooled = tl.load(first, mask=columns < tl.where(begin < end, WIDTH, 0), other=0.0).to(tl.float32)
    elif MODE == "mean":
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(begin, end, ROWS):
            row = first + tl.arange(0, ROWS)
            mask = (row < end)[:, None] & within[None, :]
            offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
            total += tl.load(hidden_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        pooled = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    else:
        best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
        at = tl.full((ROWS, COLUMNS), _NO_ROW, tl.int32)
        for first in range(begin, end, ROWS):
            row = first + tl.arange(0, ROWS)
            mask = (row < end)[:, None] & within[None, :]
            offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
            x = tl.load(hidden_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
            better = (x > best) | (x != x)  # NaN stays
            best = tl.where(better, x, best)
            at = tl.where(better, row[:, None], at)
        pooled = tl.max(best, 0)
        chosen = tl.min(tl.where(best == pooled[None, :], at, _NO_ROW), 0)
        nans = tl.sum((best != best).to(tl.int32), 0)
        pooled = tl.where(nans > 0, float("nan"), pooled)
        pooled = tl.where(begin < end, pooled, 0.0)
        tl.store(chosen_ptr + out, chosen, mask=within)
    tl.store(pooled_ptr + out, pooled, mask=within)


@triton.jit
def _pooling_backward(
    dpooled_ptr,  # [sentences, WIDTH] fp32
    cu_seqlens_ptr,  # [sentences + 1] int32
    chosen_ptr,  # [sentences, WIDTH] int32: the row of each maximum
    dhidden_ptr,  # [rows, WIDTH]
    rows, sentences,
    MODE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < WIDTH
    low = tl.zeros((ROWS,), tl.int32)
    high = low + sentences
    for _ in range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        ended = searching & (tl.load(cu_seqlens_ptr + middle + 1, mask=searching, other=0) <= row)
        high = tl.where(searching & (ended == 0), middle, high)
        low = tl.where(ended, middle + 1, low)
    sentence = low  # the first one that ends behind the row
    begin = tl.load(cu_seqlens_ptr + sentence, mask=sentence < sentences, other=rows)
    owned = (row == begin) if MODE == "cls" else (row >= begin)
    mask = (owned & (row < rows))[:, None] & within[None, :]
    offsets = sentence.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    dhidden = tl.load(dpooled_ptr + offsets, mask=mask, other=0.0)
    if MODE == "mean":
        end = tl.load(cu_seqlens_ptr + sentence + 1, mask=sentence < sentences, other=0)
        dhidden /= tl.maximum(end - begin, 1).to(tl.float32)[:, None]
    if MODE == "max":
        chosen = tl.load(chosen_ptr + offsets, mask=mask, other=_NO_ROW)
        dhidden = tl.where(chosen == row[:, None], dhidden, 0.0)
    out = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(dhidden_ptr + out, dhidden.to(dhidden_ptr.dtype.element_ty), mask=(row < rows)[:, None] & within[None, :])


def pooling_forward(hidden: Tensor, cu_seqlens: Tensor, mode: str, pooled: Tensor, chosen: Tensor) -> None:
    """hidden [N, H], cu_seqlens [B + 1] int32 -> pooled [B, H] fp32, and for mode "max" chosen [B, H] int32."""
    sentences, width = pooled.shape
    if sentences:
        _pooling_forward[(sentences, cdiv(width, COLUMNS))](
            hidden, cu_seqlens, pooled, chosen, MODE=mode, WIDTH=width, ROWS=FORWARD_ROWS, **_LAUNCH
        )


def pooling_backward(
    dpooled: Tensor, cu_seqlens: Tensor, chosen: Tensor, mode: str, rows: int, dtype: torch.dtype, dhidden: Tensor
) -> None:
    """dpooled [B, H] fp32 -> dhidden [N, H]; rows of no sentence get zeros."""
    sentences, width = dpooled.shape
    if rows:
        _pooling_backward[(cdiv(rows, BACKWARD_ROWS), cdiv(width, COLUMNS))](
            dpooled, cu_seqlens, chosen, dhidden, rows, sentences,
            MODE=mode, STEPS=sentences.bit_length(), WIDTH=width, ROWS=BACKWARD_ROWS, **_LAUNCH,
        )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Each mode; both dtypes, a full and a partial column block; for the ahead-of-time check."""
    settings = [(torch.bfloat16, 100), (torch.bfloat16, 768), (torch.float32, 768)]
    for mode in ("mean", "cls", "max"):
        for dtype, width in settings if mode == "mean" else settings[1:2]:
            hidden, pooled = meta(2816, width, dtype=dtype), meta(160, width)
            offsets, chosen = meta(161, dtype=torch.int32), meta(160, width, dtype=torch.int32)
            label = f"{mode} {str(dtype)[6:]} {width}"
            yield Launch(f"forward {label}", partial(pooling_forward, hidden, offsets, mode, pooled, chosen))
            backward = (pooled, offsets, chosen, mode, 2816, dtype, hidden)
            yield Launch(f"backward {label}", partial(pooling_backward, *backward))
