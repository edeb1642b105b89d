# SPDX-License-Identifier: Apache-2.0
"""Column sums by task, reduced in a fixed order: how dgamma, dbeta and dbias of every task come out of one backward.

Program i of a backward owns rows [i * rows_per_program, (i + 1) * rows_per_program). It splits them at the tasks' bounds,
which it reads from the device, and writes one row of partial sums for each task. From row to row neither program nor
task decreases, so `program + task` gives each (program, task) pair a row of its own, and the buffer has programs + T - 1
rows for any bounds. `finish` then adds each task's partial rows in ascending order. There are no atomics and no locks:
the result depends on the bounds and the launch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """Rows split into equal contiguous ranges, a program each."""

    rows_per_program: int
    programs: int

    @staticmethod
    def of(rows: int, rows_per_program: int) -> Partition:
        """As many ranges of `rows_per_program` rows as it takes (at least one)."""
        return Partition(rows_per_program, max(1, triton.cdiv(rows, rows_per_program)))

    @staticmethod
    def among(rows: int, tile_rows: int, programs: int) -> Partition:
        """At most `programs` ranges, each a multiple of `tile_rows` long."""
        return Partition.of(rows, max(1, triton.cdiv(rows, programs * tile_rows)) * tile_rows)

    def partials(self, tasks: int, quantities: int, width: int, device: torch.device) -> Tensor:
        """The uninitialised buffer of partial sums [programs + T - 1, quantities, width], fp32."""
        return torch.empty(self.programs + tasks - 1, quantities, width, dtype=torch.float32, device=device)


#: Partial rows that `finish` loads at once, and their columns.
SLOTS, COLUMNS = 32, 64


@triton.jit
def task_rows(bounds_ptr, task, begin, end):
    """The rows of `task` among [begin, end): first, and one past the last."""
    return tl.maximum(begin, tl.load(bounds_ptr + task)), tl.minimum(end, tl.load(bounds_ptr + task + 1))


@triton.jit
def store_partial(
    partials_ptr, slot, quantity: tl.constexpr, values, columns, QUANTITIES: tl.constexpr, WIDTH: tl.constexpr
):
    """Writes one quantity's partial sums [columns] of one (program, task) pair; slot = program + task."""
    row = (slot.to(tl.int64) * QUANTITIES + quantity) * WIDTH
    tl.store(partials_ptr + row + columns, values, mask=columns < WIDTH)


@triton.jit
def _finish_column_sums(
    partials_ptr,  # [programs + T - 1, QUANTITIES, WIDTH] fp32
    bounds_ptr,  # [T + 1] int32
    out0_ptr,  # [T, WIDTH] or None
    out1_ptr,  # [T, WIDTH] or None
    out2_ptr,  # [T, QUANTITIES - 2, WIDTH] or None
    stride0, stride1, stride2, rows_per_program,
    QUANTITIES: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    task = tl.program_id(1).to(tl.int64)
    quantity = tl.program_id(2)
    begin = tl.load(bounds_ptr + task)
    end = tl.load(bounds_ptr + task + 1)
    first = begin // rows_per_program
    last = tl.where(begin < end, (end - 1) // rows_per_program + 1, first)  # one past the last that saw the task
    total = tl.zeros((SLOTS, COLUMNS), tl.float32)
    for program in range(first, last, SLOTS):
        programs = program + tl.arange(0, SLOTS)
        offsets = ((programs + task) * QUANTITIES + quantity) * WIDTH
        mask = (programs < last)[:, None] & (columns < WIDTH)[None, :]
        total += tl.load(partials_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    mask = columns < WIDTH
    if quantity == 0:
        if out0_ptr is not None:
            tl.store(out0_ptr + task * stride0 + columns, sums.to(out0_ptr.dtype.element_ty), mask=mask)
    elif quantity == 1:
        if out1_ptr is not None:
            tl.store(out1_ptr + task * stride1 + columns, sums.to(out1_ptr.dtype.element_ty), mask=mask)
    else:
        if out2_ptr is not None:
            row = task * stride2 + (quantity - 2) * WIDTH
            tl.store(out2_ptr + row + columns, sums.to(out2_ptr.dtype.element_ty), mask=mask)


def finish(partials: Tensor, bounds: Tensor, partition: Partition, outputs: Sequence[Tensor | None]) -> None:
    """Adds the partial rows of each task into `outputs[quantity]` [T, width] (None: not wanted); empty tasks get zeros.

    The third output takes all further quantities [T, quantities - 2, width]. Outputs may have any task stride, fp32 or
    bf16; they are overwritten.
    """
    _, quantities, width = partials.shape
    if all(out is None for out in outputs):
        return
    padded = [*outputs, None, None][:3]
    strides = [0 if out is None else out.stride(0) for out in padded]
    grid = (triton.cdiv(width, COLUMNS), bounds.numel() - 1, quantities)
    _finish_column_sums[grid](
        partials, bounds, *padded, *strides, partition.rows_per_program, QUANTITIES=quantities, WIDTH=width,
        SLOTS=SLOTS, COLUMNS=COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
