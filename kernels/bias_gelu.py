# SPDX-License-Identifier: Apache-2.0
"""y = GELU(x + bias) in BERT's erf form, forward and backward, with the bias gradient of every task.

    GELU(u) = u Phi(u),   GELU'(u) = Phi(u) + u phi(u)      (Hendrycks & Gimpel 2016)

The time is that of the memory traffic: each tensor is read or written once, 16 bytes a thread. The backward's programs
walk down a column block and keep its sums in registers; column_sums.py adds them up by task.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import cdiv
from minbert_fast.kernels.column_sums import Partition, finish, store_partial, task_rows
from minbert_fast.kernels.launches import Launch, meta

# A program's tile: a warp covers 256 columns of a row with 16-byte loads of bf16.
ROWS, COLUMNS = 8, 256
ROWS_PER_PROGRAM = 64  # of the backward: its partial sums are then 2 % of its traffic
_LAUNCH = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _bias_gelu_forward(
    x_ptr,  # [rows, WIDTH]
    bias_ptr,  # [WIDTH]
    y_ptr,  # [rows, WIDTH]
    rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    within = columns < WIDTH
    mask = (row < rows)[:, None] & within[None, :]
    offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_backward(
    dy_ptr,  # [rows, WIDTH]
    x_ptr,  # [rows, WIDTH]
    bias_ptr,  # [WIDTH]
    bounds_ptr,  # [tasks + 1] int32
    dx_ptr,  # [rows, WIDTH]
    partials_ptr,  # [programs + tasks - 1, 1, WIDTH] fp32: dbias
    rows, tasks, rows_per_program,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(1)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    within = columns < WIDTH
    bias = tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
    for task in range(tasks):
        low, high = task_rows(bounds_ptr, task, begin, end)
        if low < high:
            dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(low, high, ROWS):
                row = first + tl.arange(0, ROWS)
                mask = (row < high)[:, None] & within[None, :]
                offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
                u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
                dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                cumulative = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
                density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
                dx = dy * (cumulative + u * density)
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                dbias += dx
            store_partial(partials_ptr, program + task, 0, tl.sum(dbias, 0), columns, 1, WIDTH)
    for first in range(tl.maximum(begin, tl.load(bounds_ptr + tasks)), end, ROWS):  # padding: rows of no task
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & within[None, :]
        offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        tl.store(dx_ptr + offsets, tl.zeros((ROWS, COLUMNS), dx_ptr.dtype.element_ty), mask=mask)


def bias_gelu_forward(x: Tensor, bias: Tensor, y: Tensor) -> None:
    """x [N, F] contiguous, bias [F] -> y [N, F]."""
    rows, width = x.shape
    if rows:
        grid = (cdiv(width, COLUMNS), cdiv(rows, ROWS))
        _bias_gelu_forward[grid](x, bias, y, rows, WIDTH=width, **_LAUNCH)


def partition(rows: int) -> Partition:
    """The programs of a backward along the rows, and the rows of each."""
    return Partition.of(rows, ROWS_PER_PROGRAM)


def bias_gelu_unfinished(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dx: Tensor, partials: Tensor) -> None:
    """Writes dx [N, F] and the programs' column sums [programs + T - 1, 1, F] of dbias (see `partition`).

    Rows from bounds[T] on get zero gradients and add to none.
    """
    rows, width = x.shape
    parts = partition(rows)
    _bias_gelu_backward[(cdiv(width, COLUMNS), parts.programs)](
        dy, x, bias, bounds, dx, partials, rows, bounds.numel() - 1, parts.rows_per_program, WIDTH=width, **_LAUNCH
    )


def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dbias: Tensor | None, dx: Tensor) -> None:
    """The same, and dbias [T, F] (None: not wanted; any task stride)."""
    parts = partition(x.shape[0])
    partials = parts.partials(bounds.numel() - 1, 1, x.shape[1], x.device)
    bias_gelu_unfinished(dy, x, bias, bounds, dx, partials)
    finish(partials, bounds, parts, (dbias,))


def launches() -> Iterator[Launch]:
    """Each dtype, a full and a partial column block, for the ahead-of-time check."""
    for dtype, width in [(torch.bfloat16, 3072), (torch.float16, 3072), (torch.float32, 3072), (torch.bfloat16, 100)]:
        x, bias = meta(2816, width, dtype=dtype), meta(width)
        bounds, dbias = meta(4, dtype=torch.int32), meta(3, width)
        label = f"{str(dtype)[6:]} {width}"
        yield Launch(f"forward {label}", partial(bias_gelu_forward, x, bias, x))
        yield Launch(f"backward {label}", partial(bias_gelu_backward, x, x, bias, bounds, dbias, x))
