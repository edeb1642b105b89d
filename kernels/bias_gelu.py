# SPDX-License-Identifier: Apache-2.0
"""y = GELU(x + bias) in BERT's erf form, forward and backward, with the bias gradient of every task.

    GELU(u) = u Phi(u),   GELU'(u) = Phi(u) + u phi(u)      (Hendrycks & Gimpel 2016)

Each tensor is read or written once, 16 bytes a thread. The backward's programs walk down a column block and keep its
sums in registers; column_sums.py adds them up by task. A program loads its next rows before it computes with the
present ones. For bf16 and fp16 GELU' is one polynomial: erf and exp take longer than the memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import cdiv, multiprocessors
from minbert_fast.kernels.column_sums import Partition, finish, store_partial, task_rows
from minbert_fast.kernels.launches import Launch, meta

# A program's tile; the backward's is narrower.
ROWS, COLUMNS, BACKWARD_COLUMNS = 8, 256, 128
#: Programs of the backward a multiprocessor. On an H100, 8 were best at BERT-base's size and 4 at MiniLM-L6's, by 2 and 6 %.
RESIDENT = 6
_LAUNCH = {"ROWS": ROWS, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _bias_gelu_forward(
    x_ptr,  # [rows, WIDTH]
    bias_ptr,  # [WIDTH]
    y_ptr,  # [rows, WIDTH]
    rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # All along the grid's first axis: the others end at 65,535, which 524,280 rows reach.
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    within = columns < WIDTH
    mask = (row < rows)[:, None] & within[None, :]
    offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _derivative(u, EXACT: tl.constexpr):
    """GELU'(u), or within 2e-5 of it: 1/2 + u q(u^2) up to |u| = 5, constant beyond."""
    if EXACT:
        cumulative = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        return cumulative + u * (0.3989422804014327 * tl.exp(-0.5 * u * u))
    near = tl.clamp(u, -5.0, 5.0, propagate_nan=tl.PropagateNan.ALL)
    t = near * near * (2.0 / 25.0) - 1.0  # [-1, 1]: the minimax polynomial of degree 11 is well conditioned in t
    q = -0.02072042413 * t + 0.046514704823
    q = q * t - 0.02772105485
    q = q * t + 0.021228043362
    q = q * t - 0.06844847649
    q = q * t + 0.095120005309
    q = q * t - 0.08535527437
    q = q * t + 0.077089376747
    q = q * t - 0.07154195755
    q = q * t + 0.066826179623
    q = q * t - 0.07512278109
    q = q * t + 0.142130583524
    return q * near + 0.5


@triton.jit
def _rows(ptr, row, high, columns, WIDTH: tl.constexpr):
    """Rows `row` below `high` of a column block, zero elsewhere; as stored, to be short of registers."""
    mask = (row < high)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


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
            row = low + tl.arange(0, ROWS)
            next_x = _rows(x_ptr, row, high, columns, WIDTH)
            next_dy = _rows(dy_ptr, row, high, columns, WIDTH)
            for first in range(low, high, ROWS):
                x, dy = next_x, next_dy
                row = first + tl.arange(0, ROWS)
                next_x = _rows(x_ptr, row + ROWS, high, columns, WIDTH)
                next_dy = _rows(dy_ptr, row + ROWS, high, columns, WIDTH)
                slope = _derivative(x.to(tl.float32) + bias[None, :], x_ptr.dtype.element_ty == tl.float32)
                dx = dy.to(tl.float32) * slope
                mask = (row < high)[:, None] & within[None, :]
                offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
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
        grid = (cdiv(width, COLUMNS) * cdiv(rows, ROWS),)
        _bias_gelu_forward[grid](x, bias, y, rows, WIDTH=width, COLUMNS=COLUMNS, **_LAUNCH)


def partition(rows: int, width: int, device: torch.device) -> Partition:
    """The programs of a backward along the rows, and the rows of each."""
    programs = RESIDENT * multiprocessors(device) // cdiv(width, BACKWARD_COLUMNS)
    return Partition.among(rows, ROWS, max(1, programs))


def bias_gelu_unfinished(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dx: Tensor, partials: Tensor) -> None:
    """Writes dx [N, F] and the programs' column sums [programs + T - 1, 1, F] of dbias (see `partition`).

    Rows from bounds[T] on get zero gradients and add to none.
    """
    rows, width = x.shape
    parts = partition(rows, width, x.device)
    _bias_gelu_backward[(cdiv(width, BACKWARD_COLUMNS), parts.programs)](
        dy, x, bias, bounds, dx, partials, rows, bounds.numel() - 1, parts.rows_per_program, WIDTH=width,
        COLUMNS=BACKWARD_COLUMNS, **_LAUNCH,
    )  # fmt: skip


def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor, bounds: Tensor, dbias: Tensor | None, dx: Tensor) -> None:
    """The same, and dbias [T, F] (None: not wanted; any task stride)."""
    parts = partition(*x.shape, x.device)
    partials = parts.partials(bounds.numel() - 1, 1, x.shape[1], x.device)
    bias_gelu_unfinished(dy, x, bias, bounds, dx, partials)
    finish(partials, bounds, parts, (dbias,))


def launches() -> Iterator[Launch]:
    """Each dtype, a full and a partial column block, for the ahead-of-time check."""
    for dtype, width in [(torch.float16, 3072), (torch.bfloat16, 100), (torch.bfloat16, 3072), (torch.float32, 3072)]:
        x, bias = meta(2816, width, dtype=dtype), meta(width)
        bounds, dbias = meta(4, dtype=torch.int32), meta(3, width)
        label = f"{str(dtype)[6:]} {width}"
        yield Launch(f"forward {label}", partial(bias_gelu_forward, x, bias, x))
        yield Launch(f"backward {label}", partial(bias_gelu_backward, x, x, bias, bounds, dbias, x))
