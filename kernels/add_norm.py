# SPDX-License-Identifier: Apache-2.0
"""y = LayerNorm(residual + dropout(x + bias)), forward and backward, one pass over memory each.

A program holds whole rows on chip: the forward reads x and residual once and writes y, the backward reads dy, x and
residual and writes dx and dresidual; the sum before the norm and the dropout mask are computed again, not stored.
Where y went two ways, the backward reads both gradients and adds them on chip. Statistics and all arithmetic are fp32.
Per-task dgamma, dbeta and dbias leave through column_sums.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import all_registers, cdiv
from minbert_fast.kernels.column_sums import Partition, finish, store_partial, task_rows
from minbert_fast.kernels.dropout import keep_scale_quads
from minbert_fast.kernels.launches import Launch, meta
from minbert_fast.kernels.layer_norm import RowTile, norm_gradient, normalise


@triton.jit
def _branch(x_ptr, bias, offsets, mask, seed, site, row, P: tl.constexpr, BLOCK: tl.constexpr):
    """x + bias [ROWS, BLOCK] and its dropout factors (1.0 without dropout)."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    keep = keep_scale_quads(seed, site, row[:, None], tl.arange(0, BLOCK // 4)[None, :], P) if P > 0.0 else 1.0
    return x + bias[None, :], keep


@triton.jit(do_not_specialize=["site"])
def _add_norm_forward(
    x_ptr,  # [rows, WIDTH]
    bias_ptr,  # [WIDTH]
    residual_ptr,  # [rows, WIDTH]
    gamma_ptr,  # [WIDTH]
    beta_ptr,  # [WIDTH]
    y_ptr,  # [rows, WIDTH]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    seed_ptr,  # [1] int64
    site, rows, eps,
    P: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    within = columns < WIDTH
    mask = (row < rows)[:, None] & within[None, :]
    offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    seed = tl.load(seed_ptr) if P > 0.0 else 0
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
    branch, keep = _branch(x_ptr, bias, offsets, mask, seed, site, row, P, BLOCK)
    z = residual + branch * keep  # zero beyond WIDTH: x, bias and residual load as such
    y, mean, rstd = normalise(z, gamma_ptr, beta_ptr, columns, within, eps, WIDTH)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["site"])
def _add_norm_backward(
    dy_ptr,  # [rows, WIDTH]
    more_ptr,  # [rows, WIDTH], added to dy; or None
    x_ptr,  # [rows, WIDTH]
    bias_ptr,  # [WIDTH]
    residual_ptr,  # [rows, WIDTH]
    gamma_ptr,  # [WIDTH]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    bounds_ptr,  # [tasks + 1] int32
    dx_ptr,  # [rows, WIDTH]
    dresidual_ptr,  # [rows, WIDTH]
    partials_ptr,  # [programs + tasks - 1, 3, WIDTH] fp32: dgamma, dbeta, dbias
    seed_ptr,  # [1] int64
    site, rows, tasks, rows_per_program,
    P: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    columns = tl.arange(0, BLOCK)
    within = columns < WIDTH
    seed = tl.load(seed_ptr) if P > 0.0 else 0
    bias = tl.load(bias_ptr + columns, mask=within, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + columns, mask=within, other=0.0).to(tl.float32)
    for task in range(tasks):
        low, high = task_rows(bounds_ptr, task, begin, end)
        if low < high:
            dgamma = tl.zeros((BLOCK,), tl.float32)
            dbeta = tl.zeros((BLOCK,), tl.float32)
            dbias = tl.zeros((BLOCK,), tl.float32)
            for first in range(low, high, ROWS):
                row = first + tl.arange(0, ROWS)
                mask = (row < high)[:, None] & within[None, :]
                offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
                dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                if more_ptr is not None:
                    dy += tl.load(more_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                branch, keep = _branch(x_ptr, bias, offsets, mask, seed, site, row, P, BLOCK)
                z = residual + branch * keep
                dz, xhat = norm_gradient(dy, z, gamma, mean_ptr, rstd_ptr, row, mask, row < high, WIDTH)
                dx = dz * keep
                tl.store(dresidual_ptr + offsets, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
                tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                dgamma += tl.sum(dy * xhat, 0)
                dbeta += tl.sum(dy, 0)
                dbias += tl.sum(dx, 0)
            store_partial(partials_ptr, program + task, 0, dgamma, columns, 3, WIDTH)
            store_partial(partials_ptr, program + task, 1, dbeta, columns, 3, WIDTH)
            store_partial(partials_ptr, program + task, 2, dbias, columns, 3, WIDTH)
    for first in range(tl.maximum(begin, tl.load(bounds_ptr + tasks)), end, ROWS):  # padding: rows of no task
        row = first + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & within[None, :]
        offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        zero = tl.zeros((ROWS, BLOCK), dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + offsets, zero, mask=mask)
        tl.store(dresidual_ptr + offsets, zero, mask=mask)


def add_norm_forward(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float,
    p: float, seed: Tensor | None, site: int, y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """x, residual [N, H] contiguous; bias, gamma, beta [H] -> y [N, H] and fp32 mean, rstd [N]."""
    rows, width = x.shape
    tile = RowTile.of(width)
    if rows:
        _add_norm_forward[(cdiv(rows, tile.rows),)](
            x, bias, residual, gamma, beta, y, mean, rstd, seed, site, rows, eps, **tile.launch(width, p)
        )


def _backward_tile(width: int) -> RowTile:
    """At most 2 rows: as fast as 4 on an H100 at 768 columns, and a tenth faster at 384."""
    tile = RowTile.of(width)
    return replace(tile, rows=min(2, tile.rows))


def partition(rows: int, width: int, device: torch.device) -> Partition:
    """The programs of a backward, and their rows."""
    tile = _backward_tile(width)
    return Partition.among(rows, tile.rows, tile.programs(device))


def add_norm_unfinished(
    dy: Tensor, more: Tensor | None, x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    bounds: Tensor, p: float, seed: Tensor | None, site: int, dx: Tensor, dresidual: Tensor, partials: Tensor,
) -> None:  # fmt: skip
    """Writes dx, dresidual [N, H] for the gradient dy + more (None: dy alone), and the programs' column sums.

    partials [programs + T - 1, 3, H] are those of dgamma, dbeta and dbias (see `partition`). Rows from bounds[T] on get
    zero gradients and add to none.
    """
    rows, width = x.shape
    parts, tile = partition(rows, width, x.device), _backward_tile(width)
    _add_norm_backward[(parts.programs,)](
        dy, more, x, bias, residual, gamma, mean, rstd, bounds, dx, dresidual, partials, seed, site,
        rows, bounds.numel() - 1, parts.rows_per_program,
        **tile.launch(width, p), **all_registers(x.device, tile.num_warps),
    )  # fmt: skip


def add_norm_backward(
    dy: Tensor, x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor, bounds: Tensor,
    p: float, seed: Tensor | None, site: int, dgamma: Tensor | None, dbeta: Tensor | None, dbias: Tensor | None,
    dx: Tensor, dresidual: Tensor,
) -> None:  # fmt: skip
    """The same for one gradient; writes dgamma, dbeta, dbias [T, H] too (None: not wanted; any task stride)."""
    parts = partition(*x.shape, x.device)
    partials = parts.partials(bounds.numel() - 1, 3, x.shape[1], x.device)
    add_norm_unfinished(dy, None, x, bias, residual, gamma, mean, rstd, bounds, p, seed, site, dx, dresidual, partials)
    finish(partials, bounds, parts, (dgamma, dbeta, dbias))


def launches() -> Iterator[Launch]:
    """Every tile of the table, with and without dropout and the narrow-column tail, for the ahead-of-time check."""
    settings = [(torch.bfloat16, 768, 0.0), (torch.float16, 768, 0.1)]
    settings += [(torch.bfloat16, width, 0.1) for width in (64, 100, 128, 384, 768, 1024, 2048, 4096)]
    for dtype, width, p in [*settings, (torch.float32, 768, 0.1), (torch.float32, 4096, 0.1)]:
        x, vector, rows, out = meta(2816, width, dtype=dtype), meta(width), meta(2816), meta(3, width)
        seed, bounds = meta(1, dtype=torch.int64), meta(4, dtype=torch.int32)
        label = f"{str(dtype)[6:]} {width} p={p}"
        forward = (x, vector, x, vector, vector, 1e-12, p, seed, 1, x, rows, rows)
        yield Launch(f"forward {label}", partial(add_norm_forward, *forward))
        backward = (x, x, vector, x, vector, rows, rows, bounds, p, seed, 1, out, out, out, x, x)
        yield Launch(f"backward {label}", partial(add_norm_backward, *backward))
        partials = partition(2816, width, x.device).partials(3, 3, width, x.device)
        two = (x, x, x, vector, x, vector, rows, rows, bounds, p, seed, 1, x, x, partials)
        yield Launch(f"backward of two {label}", partial(add_norm_unfinished, *two))
