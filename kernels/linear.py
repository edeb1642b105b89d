# SPDX-License-Identifier: Apache-2.0
"""Each task's weight gradient J[t] = dY[rows of t]^T X[rows of t] and bias sums, all tasks in one launch.

A grouped matrix product whose groups are ranges of the inner dimension: a program owns one tile of one task's
matrix and walks down that task's rows, whose bounds it reads from the device, so that a captured graph follows the
batch. Sums are fp32, in ascending row order, and the tile is written once: deterministic without an atomic, and an
empty task gets zeros. Further programs, after those of the matrix tiles, compute the bias gradients, so that the loop
of the products does nothing else.

FLOPs are those of the plain sum over all rows; tasks multiply the number of tiles, which helps where matrices are
small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import all_registers, is_hopper_or_newer, multiprocessors
from minbert_fast.kernels.launches import Launch, meta


@dataclass(frozen=True)
class Tile:
    """A program's tile: `outputs` x `inputs` of one task's matrix, `rows` rows of dY and X at a time."""

    outputs: int
    inputs: int
    rows: int
    num_warps: int
    num_stages: int


# Two-byte types: tensor cores (wgmma on sm_90). The widest tile that still gives every multiprocessor one.
TILES = (
    Tile(outputs=128, inputs=128, rows=64, num_warps=8, num_stages=3),
    Tile(outputs=128, inputs=64, rows=64, num_warps=4, num_stages=3),
    Tile(outputs=64, inputs=64, rows=64, num_warps=4, num_stages=4),
)
# Older chips lack the registers, AMD's the shared memory.
TILE_HOPPER = Tile(outputs=128, inputs=256, rows=64, num_warps=8, num_stages=3)
# Rows that do not start at multiples of 16 elements load one by one: fewer of them at a time.
TILE_UNALIGNED = Tile(outputs=64, inputs=64, rows=32, num_warps=4, num_stages=2)
# fp32 in full precision runs on the ordinary units: a small tile, so that its products stay in registers.
TILE_FP32 = Tile(outputs=64, inputs=64, rows=16, num_warps=4, num_stages=2)
#: Tiles of one task run in groups of this many along the outputs, so that neighbours share their rows in L2.
GROUP = 8
#: A bias program's tile.
BIAS_ROWS, BIAS_COLUMNS = 32, 128


def choose(dy: Tensor, x: Tensor, tasks: int) -> Tile:
    """The largest tile of the table that gives three quarters of the multiprocessors one, else the smallest."""
    if dy.dtype == torch.float32:
        return TILE_FP32
    outputs, inputs = dy.shape[1], x.shape[1]
    if any(size % 16 for size in (outputs, inputs, dy.stride(0), x.stride(0))):
        return TILE_UNALIGNED
    for tile in (TILE_HOPPER, *TILES) if is_hopper_or_newer(dy.device) else TILES:
        tiles = tasks * triton.cdiv(outputs, tile.outputs) * triton.cdiv(inputs, tile.inputs)
        if tiles >= 0.75 * multiprocessors(dy.device):
            return tile
    return TILES[-1]


@triton.jit
def _matrix_tile(
    dy_ptr, x_ptr, bounds_ptr, dweight_ptr,
    task, tile,  # number of the tile in its task
    outputs, inputs, dy_stride, x_stride, dweight_stride, tiles_out, tiles_in,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    group = tile // (GROUP * tiles_in)
    members = tl.minimum(tiles_out - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_in)
    out = (group * GROUP + within % members) * OUT + tl.arange(0, OUT)
    into = (within // members) * IN + tl.arange(0, IN)
    low = tl.load(bounds_ptr + task)
    high = tl.load(bounds_ptr + task + 1)
    step = tl.arange(0, ROWS)
    # 64-bit where the whole tensor is addressed, 32-bit within a tile and a matrix: half the registers.
    dy_tile = dy_ptr + low.to(tl.int64) * dy_stride + (step[:, None] * dy_stride + out[None, :])
    x_tile = x_ptr + low.to(tl.int64) * x_stride + (step[:, None] * x_stride + into[None, :])
    total = tl.zeros((OUT, IN), tl.float32)
    for first in tl.range(low, high, ROWS, num_stages=STAGES):
        valid = (first + step < high)[:, None]
        dy = tl.load(dy_tile, mask=valid & (out < outputs)[None, :], other=0.0)
        x = tl.load(x_tile, mask=valid & (into < inputs)[None, :], other=0.0)
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
        dy_tile += ROWS * dy_stride
        x_tile += ROWS * x_stride
    target = dweight_ptr + task.to(tl.int64) * dweight_stride + (out[:, None] * inputs + into[None, :])
    mask = (out < outputs)[:, None] & (into < inputs)[None, :]
    tl.store(target, total.to(dweight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_tile(
    dy_ptr, bounds_ptr, dbias_ptr, task, tile, outputs, dy_stride, dbias_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    out = tile * COLUMNS + tl.arange(0, COLUMNS)
    low = tl.load(bounds_ptr + task)
    high = tl.load(bounds_ptr + task + 1)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(low, high, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < high)[:, None] & (out < outputs)[None, :]
        offsets = row.to(tl.int64)[:, None] * dy_stride + out[None, :]
        sums += tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    target = dbias_ptr + task.to(tl.int64) * dbias_stride + out
    tl.store(target, tl.sum(sums, 0).to(dbias_ptr.dtype.element_ty), mask=out < outputs)


@triton.jit
def _linear_gradients(
    dy_ptr,  # [rows, outputs]
    x_ptr,  # [rows, inputs]
    bounds_ptr,  # [tasks + 1] int32
    dweight_ptr,  # [tasks, outputs, inputs], or None
    dbias_ptr,  # [tasks, outputs], or None
    outputs, inputs, dy_stride, x_stride,
    dweight_stride,  # from task to task
    dbias_stride, tiles_out, tiles_in,
    matrix_tiles,  # of all tasks
    bias_tiles,  # of one task
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BIAS_ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr,  # in the interpreter, whose bf16 products are wrong
):  # fmt: skip
    program = tl.program_id(0)
    if program < matrix_tiles:
        if dweight_ptr is not None:
            task, tile = program // (tiles_out * tiles_in), program % (tiles_out * tiles_in)
            _matrix_tile(
                dy_ptr, x_ptr, bounds_ptr, dweight_ptr, task, tile, outputs, inputs, dy_stride, x_stride, dweight_stride,
                tiles_out, tiles_in, OUT, IN, ROWS, GROUP, STAGES, UPCAST,
            )  # fmt: skip
    else:
        if dbias_ptr is not None:
            task, tile = (program - matrix_tiles) // bias_tiles, (program - matrix_tiles) % bias_tiles
            _bias_tile(
                dy_ptr, bounds_ptr, dbias_ptr, task, tile, outputs, dy_stride, dbias_stride, BIAS_ROWS, BIAS_COLUMNS
            )


def linear_gradients(dy: Tensor, x: Tensor, bounds: Tensor, dweight: Tensor | None, dbias: Tensor | None) -> None:
    """dy [N, O], x [N, I] (any row stride) -> dweight [T, O, I], dbias [T, O] (None: not wanted; any task stride).

    Outputs are fp32 or bf16 and overwritten. Rows from bounds[T] on count for no task.
    """
    (rows, outputs), inputs = dy.shape, x.shape[1]
    assert dy.stride(1) == x.stride(1) == 1
    assert x.shape[0] == rows
    assert x.dtype == dy.dtype
    tasks = bounds.numel() - 1
    tile = choose(dy, x, tasks)
    tiles_out, tiles_in = triton.cdiv(outputs, tile.outputs), triton.cdiv(inputs, tile.inputs)
    matrix_tiles = 0 if dweight is None else tasks * tiles_out * tiles_in
    bias_tiles = 0 if dbias is None else triton.cdiv(outputs, BIAS_COLUMNS)
    if matrix_tiles + bias_tiles == 0:
        return
    _linear_gradients[(matrix_tiles + tasks * bias_tiles,)](
        dy, x, bounds, dweight, dbias, outputs, inputs, dy.stride(0), x.stride(0),
        0 if dweight is None else dweight.stride(0), 0 if dbias is None else dbias.stride(0),
        tiles_out, tiles_in, matrix_tiles, bias_tiles,
        OUT=tile.outputs, IN=tile.inputs, ROWS=tile.rows, GROUP=GROUP, BIAS_ROWS=BIAS_ROWS, BIAS_COLUMNS=BIAS_COLUMNS,
        STAGES=tile.num_stages, UPCAST=dy.device.type == "cpu" and dy.dtype == torch.bfloat16,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        **all_registers(dy.device, tile.num_warps),
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Every tile of the table and each dtype, for the ahead-of-time check."""
    sizes = [(3072, 768), (2304, 768), (768, 768), (1536, 384), (384, 384), (100, 36)]
    settings = [(torch.bfloat16, *size) for size in sizes] + [
        (dtype, 768, 768) for dtype in (torch.float16, torch.float32)
    ]
    for dtype, outputs, inputs in settings:
        dy, x = meta(2816, outputs, dtype=dtype), meta(2816, inputs, dtype=dtype)
        bounds = meta(4, dtype=torch.int32)
        for out in (torch.float32, torch.bfloat16):
            dweight, dbias = meta(3, outputs, inputs, dtype=out), meta(3, outputs, dtype=out)
            label = f"{str(dtype)[6:]} {outputs}x{inputs} -> {str(out)[6:]}"
            yield Launch(label, partial(linear_gradients, dy, x, bounds, dweight, dbias))
