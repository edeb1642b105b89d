# SPDX-License-Identifier: Apache-2.0
"""Column sums by task, reduced in a fixed order: how dgamma, dbeta and dbias of every task come out of one backward.

Program i of a backward owns rows [i * rows_per_program, (i + 1) * rows_per_program). It splits them at the tasks' bounds,
which it reads from the device, and writes one row of partial sums for each task. From row to row neither program nor
task decreases, so `program + task` gives each (program, task) pair a row of its own, and the buffer has programs + T - 1
rows for any bounds. `finish` then adds each task's partial rows in ascending order; `finish_many` does so for any number of
backwards in one launch, which finds them in a table in device memory. There are no atomics and no locks: the result
depends on the bounds and the launch alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import TYPES, cdiv, next_power_of_2
from minbert_fast.kernels.launches import Launch, meta


@dataclass(frozen=True)
class Partition:
    """Rows split into equal contiguous ranges, a program each."""

    rows_per_program: int
    programs: int

    @staticmethod
    def of(rows: int, rows_per_program: int) -> Partition:
        """As many ranges of `rows_per_program` rows as it takes (at least one)."""
        return Partition(rows_per_program, max(1, cdiv(rows, rows_per_program)))

    @staticmethod
    def among(rows: int, tile_rows: int, programs: int) -> Partition:
        """At most `programs` ranges, each a multiple of `tile_rows` long."""
        return Partition.of(rows, max(1, cdiv(rows, programs * tile_rows)) * tile_rows)

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
def _sums(
    partials_ptr, bounds_ptr, task, rows_per_program, quantities, quantity, width, columns,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One quantity's sums [COLUMNS] over the rows of a task, from the partial sums of the programs that saw it."""
    begin = tl.load(bounds_ptr + task)
    end = tl.load(bounds_ptr + task + 1)
    first = begin // rows_per_program
    last = tl.where(begin < end, (end - 1) // rows_per_program + 1, first)  # one past the last that saw the task
    total = tl.zeros((SLOTS, COLUMNS), tl.float32)
    for program in range(first, last, SLOTS):
        programs = program + tl.arange(0, SLOTS)
        offsets = ((programs + task) * quantities + quantity) * width
        mask = (programs < last)[:, None] & (columns < width)[None, :]
        total += tl.load(partials_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


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
    sums = _sums(partials_ptr, bounds_ptr, task, rows_per_program, QUANTITIES, quantity, WIDTH, columns, SLOTS, COLUMNS)
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
    grid = (cdiv(width, COLUMNS), bounds.numel() - 1, quantities)
    _finish_column_sums[grid](
        partials, bounds, *padded, *strides, partition.rows_per_program, QUANTITIES=quantities, WIDTH=width,
        SLOTS=SLOTS, COLUMNS=COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


class Unfinished(NamedTuple):
    """Partial sums of one backward, and where the sums of each quantity go."""

    partials: Tensor  # [programs + T - 1, quantities, width] fp32
    rows_per_program: int
    outputs: Sequence[Tensor | None]  # [T, width] of each quantity, any task stride; None: not wanted


#: Columns of the table of sums.
PARTIALS, OUT, OUT_STRIDE, ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
QUANTITIES, QUANTITY, WIDTH, FIRST = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
FIELDS = tl.constexpr(8)


@triton.jit
def _finish_many(
    table_ptr,  # [rows, FIELDS] int64
    bounds_ptr,  # [T + 1] int32
    rows,
    TYPE: tl.constexpr,  # of the outputs
    ALIGNED: tl.constexpr,  # every width is a multiple of 4
    TABLE: tl.constexpr,  # rows, rounded up to a power of 2
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, TABLE)
    firsts = tl.load(table_ptr + row * FIELDS + FIRST, mask=row < rows, other=2147483647)
    row_ptr = table_ptr + FIELDS * (tl.sum((firsts <= block).to(tl.int32), 0) - 1)
    partials_ptr = tl.load(row_ptr + PARTIALS).to(tl.pointer_type(tl.float32))
    out_ptr = tl.load(row_ptr + OUT).to(tl.pointer_type(TYPE))
    width = tl.load(row_ptr + WIDTH)
    if ALIGNED:  # each number needs its own hint, or memory moves by single elements
        partials_ptr = tl.multiple_of(partials_ptr, 16)
        width = tl.multiple_of(width, 4)
    columns = (block - tl.load(row_ptr + FIRST)) * COLUMNS + tl.arange(0, COLUMNS)
    sums = _sums(
        partials_ptr, bounds_ptr, task, tl.load(row_ptr + ROWS).to(tl.int32), tl.load(row_ptr + QUANTITIES),
        tl.load(row_ptr + QUANTITY), width, columns, SLOTS, COLUMNS,
    )  # fmt: skip
    target = out_ptr + task * tl.load(row_ptr + OUT_STRIDE) + columns
    tl.store(target, sums.to(TYPE), mask=columns < width)


def many_table(sums: Sequence[Unfinished]) -> tuple[list[list[int]], int]:
    """The rows of the table that `finish_many` reads, and the number of its blocks."""
    rows, blocks = [], 0
    for partials, rows_per_program, outputs in sums:
        _, quantities, width = partials.shape
        for quantity, out in enumerate(outputs):
            if out is not None:
                where = [partials.data_ptr(), out.data_ptr(), out.stride(0)]
                rows.append([*where, rows_per_program, quantities, quantity, width, blocks])
                blocks += cdiv(width, COLUMNS)
    return rows, blocks


def finish_many(sums: Sequence[Unfinished], where: Tensor, blocks: int, bounds: Tensor) -> None:
    """`finish` for all of `sums`, whose outputs have one dtype. `where` is their `many_table` in device memory."""
    dtype = next(out.dtype for each in sums for out in each.outputs if out is not None)
    aligned = not any(each.partials.shape[2] % 4 or each.partials.data_ptr() % 16 for each in sums)
    _finish_many[(blocks, bounds.numel() - 1)](
        where, bounds, len(where), TYPE=TYPES[dtype], ALIGNED=aligned, TABLE=next_power_of_2(len(where)),
        SLOTS=SLOTS, COLUMNS=COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """The sums of many backwards, fp32 and bf16, for the ahead-of-time check; the others' checks compile `finish`."""
    for dtype in (torch.float32, torch.bfloat16):
        sums = [Unfinished(meta(266, 3, 768), 12, [meta(3, 768, dtype=dtype)] * 3)] * 24
        rows, blocks = many_table(sums)
        where, bounds = meta(len(rows), FIELDS.value, dtype=torch.int64), meta(4, dtype=torch.int32)
        yield Launch(f"many {str(dtype)[6:]}", partial(finish_many, sums, where, blocks, bounds))
