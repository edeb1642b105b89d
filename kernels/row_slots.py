# SPDX-License-Identifier: Apache-2.0
"""For each row of a table its place in an ascending list of row numbers, by bisection: one launch, without a fill."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import cdiv
from minbert_fast.kernels.launches import Launch, meta

ROWS = 1024  # a program


@triton.jit
def _row_slots(
    ids_ptr,  # [listed] int32, ascending; then -1
    slots_ptr,  # [rows] int32
    listed, rows,
    STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low = tl.zeros((ROWS,), tl.int32)
    high = low + listed
    for _ in range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        number = tl.load(ids_ptr + middle, mask=searching, other=0)
        right = searching & (number >= 0) & (number < row)  # -1 stands for a number above all rows
        high = tl.where(searching & (right == 0), middle, high)
        low = tl.where(right, middle + 1, low)
    found = tl.load(ids_ptr + low, mask=low < listed, other=-1) == row
    tl.store(slots_ptr + row, tl.where(found, low, -1), mask=row < rows)


def row_slots(ids: Tensor, slots: Tensor) -> None:
    """ids int32 [U], ascending, then -1 -> slots int32 [V]: where each row stands in ids, or -1."""
    _row_slots[(cdiv(slots.numel(), ROWS),)](
        ids, slots, ids.numel(), slots.numel(), STEPS=ids.numel().bit_length(), ROWS=ROWS, num_warps=4,
        enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """BERT's vocabulary, for the ahead-of-time check."""
    yield Launch("30522 rows", partial(row_slots, meta(2816, dtype=torch.int32), meta(30522, dtype=torch.int32)))
