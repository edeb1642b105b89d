# SPDX-License-Identifier: Apache-2.0
"""Each task's weight gradient J[t] = dY[rows of t]^T X[rows of t] and bias sums: of one layer, or of many at once.

A grouped matrix product whose groups are ranges of the inner dimension: a program takes one tile of one task's matrix and
walks down that task's rows, whose bounds it reads from the device, so that a captured graph follows the batch. Sums are
fp32, in ascending row order, and the tile is written once: deterministic without an atomic, and an empty task gets zeros.
FLOPs are those of the plain sum over all rows.

`linear_gradients` is one layer, a program for each (task, tile). `weight_gradients` is any number of layers: pointers and
sizes come from a table in device memory, and as many programs as the device runs at once walk over all tiles, so that only
the last round of tiles leaves multiprocessors idle. There a program takes a tile for all tasks in turn. So it can add the
inner products of the tasks' tiles to its partial Gram matrix while these tiles are on chip or in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import (
    TYPES,
    all_registers,
    cdiv,
    is_hopper_or_newer,
    multiprocessors,
    next_power_of_2,
)
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
# Many layers in two-byte types: on an H100, at two programs a multiprocessor, the fastest of ten at both models' sizes.
GROUPED = Tile(outputs=128, inputs=128, rows=64, num_warps=4, num_stages=3)
#: Warps of such a tile where the matrix units read registers, of tiles that are not aligned, and of fp32's.
GROUPED_WARPS = 8
#: Bytes a thread that the four-warp programs spill between two tiles. On an H100 eight warps, which spill nothing, take 1.3
#: times as long.
SPILLED = 80
#: Programs a multiprocessor.
RESIDENT = 2
#: Rows of all tasks' tiles that are multiplied with each other at once. More would spill registers.
PARTS = 192
#: Most tasks whose inner products a program keeps.
MOST_TASKS = 8


class Problem(NamedTuple):
    """One layer's gradients: dy [N, O], x [N, I] (any row stride) -> dweight [T, O, I], dbias [T, O] (any task stride)."""

    dy: Tensor
    x: Tensor
    dweight: Tensor | None
    dbias: Tensor | None


#: Columns of the table. A row is a weight or a bias; a bias has no x, and no tiles along its inputs.
DY, X, TARGET = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
OUTPUTS, INPUTS = tl.constexpr(3), tl.constexpr(4)
DY_STRIDE, X_STRIDE, TARGET_STRIDE = tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
FIRST_TILE, TILES_IN, FIELDS = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10)


def choose(dy: Tensor, x: Tensor, tasks: int) -> Tile:
    """The largest tile of the table that gives three quarters of the multiprocessors one, else the smallest."""
    if dy.dtype == torch.float32:
        return TILE_FP32
    outputs, inputs = dy.shape[1], x.shape[1]
    if any(size % 16 for size in (outputs, inputs, dy.stride(0), x.stride(0))):
        return TILE_UNALIGNED
    for tile in (TILE_HOPPER, *TILES) if is_hopper_or_newer(dy.device) else TILES:
        tiles = tasks * cdiv(outputs, tile.outputs) * cdiv(inputs, tile.inputs)
        if tiles >= 0.75 * multiprocessors(dy.device):
            return tile
    return TILES[-1]


@triton.jit
def _place(tile, tiles_out, tiles_in, GROUP: tl.constexpr):
    """Tile number `tile` of a matrix: which one it is along the outputs, and along the inputs."""
    group = tile // (GROUP * tiles_in)
    members = tl.minimum(tiles_out - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_in)
    return group * GROUP + within % members, within // members


@triton.jit
def _matrix_tile(
    dy_ptr, x_ptr, bounds_ptr, dweight_ptr,
    task, tile,  # number of the tile in its task
    outputs, inputs, dy_stride, x_stride, dweight_stride, tiles_out, tiles_in,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row, column = _place(tile, tiles_out, tiles_in, GROUP)
    out = row * OUT + tl.arange(0, OUT)
    into = column * IN + tl.arange(0, IN)
    low = tl.load(bounds_ptr + task)
    high = tl.load(bounds_ptr + task + 1)
    step = tl.arange(0, ROWS)
    # 64-bit where the whole tensor is addressed, 32-bit within a tile and a matrix: half the registers.
    dy_rows = dy_ptr + low.to(tl.int64) * dy_stride
    x_rows = x_ptr + low.to(tl.int64) * x_stride
    dy_offsets = step[:, None] * dy_stride + out[None, :]
    x_offsets = step[:, None] * x_stride + into[None, :]
    total = tl.zeros((OUT, IN), tl.float32)
    for first in tl.range(low, high, ROWS, num_stages=STAGES):
        valid = (first + step < high)[:, None]
        dy = tl.load(dy_rows + dy_offsets, mask=valid & (out < outputs)[None, :], other=0.0)
        x = tl.load(x_rows + x_offsets, mask=valid & (into < inputs)[None, :], other=0.0)
        if UPCAST:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        total = tl.dot(tl.trans(dy), x, total, input_precision="ieee")
        dy_rows += ROWS * dy_stride
        x_rows += ROWS * x_stride
    target = dweight_ptr + tl.cast(task, tl.int64) * dweight_stride + (out[:, None] * inputs + into[None, :])
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
    target = dbias_ptr + tl.cast(task, tl.int64) * dbias_stride + out
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


@triton.jit
def _number(row_ptr, column: tl.constexpr, ALIGNED: tl.constexpr):
    """A size or a stride of the table. Each needs its own hint, or memory moves by single elements."""
    value = tl.load(row_ptr + column)
    if ALIGNED:
        value = tl.multiple_of(value, 16)
    return value.to(tl.int32)


@triton.jit
def _pointer(row_ptr, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row_ptr + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # bytes; the number before the cast would lose the hint
    return pointer


@triton.jit
def _tile_gram(
    out_ptr, out_stride, outputs, inputs, first_out, first_in,
    TASKS: tl.constexpr, T: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The inner products [T * T] of the tasks' tiles, upper triangle, read back from the cache, PART rows at a time.

    All tasks' parts are asked for before the first is used, and the warps meet once: the time is the latency of the cache.
    """
    into = first_in + tl.arange(0, IN)
    pair = tl.arange(0, T * T)[None, :]
    sums = tl.zeros((PART, T * T), tl.float32)
    for part in range(0, OUT, PART):
        out = first_out + part + tl.arange(0, PART)
        offsets = out[:, None] * inputs + into[None, :]
        mask = (out < outputs)[:, None] & (into < inputs)[None, :]
        tiles = ()
        for task in tl.static_range(TASKS):
            place = tl.cast(task, tl.int64) * out_stride + offsets
            tiles = tiles + (tl.load(out_ptr + place, mask=mask, other=0.0),)  # noqa: RUF005  # Triton knows no *
        for a in tl.static_range(TASKS):
            for b in tl.static_range(a, TASKS):
                rows = tl.sum(tiles[a].to(tl.float32) * tiles[b].to(tl.float32), 1)
                sums += tl.where(pair == a * T + b, rows[:, None], 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _weight_gradients(
    table_ptr,  # [problems, FIELDS] int64
    bounds_ptr,  # [tasks + 1] int32
    partials_ptr,  # [programs, T, T] fp32, or None: the upper triangle of each program's part of the Gram matrix
    tasks, problems, tiles, programs,
    TASKS: tl.constexpr,  # tasks where there are partial Gram matrices
    PROBLEMS: tl.constexpr,  # problems, rounded up to a power of 2
    TYPE: tl.constexpr,  # of dY and X
    OUT_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every pointer, size and stride is a multiple of 16
    T: tl.constexpr,  # tasks, rounded up to a power of 2
    ADD: tl.constexpr,  # to the partial Gram matrices of an earlier launch
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BIAS_ROWS: tl.constexpr,
    BIAS_COLUMNS: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    problem = tl.arange(0, PROBLEMS)
    firsts = tl.load(table_ptr + problem * FIELDS + FIRST_TILE, mask=problem < problems, other=2147483647)
    pair = tl.arange(0, T * T)
    if partials_ptr is not None:
        partials_ptr += program * T * T
        if not ADD:
            tl.store(partials_ptr + pair, tl.zeros((T * T,), tl.float32))
    for number in range(program, tiles, programs):
        row_ptr = table_ptr + FIELDS * (tl.sum((firsts <= number).to(tl.int32), 0) - 1)
        tile = number - tl.load(row_ptr + FIRST_TILE).to(tl.int32)
        tiles_in = tl.load(row_ptr + TILES_IN).to(tl.int32)
        dy_ptr = _pointer(row_ptr, DY, TYPE, ALIGNED)
        out_ptr = _pointer(row_ptr, TARGET, OUT_TYPE, ALIGNED)
        outputs = _number(row_ptr, OUTPUTS, ALIGNED)
        dy_stride = _number(row_ptr, DY_STRIDE, ALIGNED)
        out_stride = tl.load(row_ptr + TARGET_STRIDE)
        if ALIGNED:
            out_stride = tl.multiple_of(out_stride, 16)
        if tiles_in == 0:
            for task in range(tasks):
                _bias_tile(
                    dy_ptr, bounds_ptr, out_ptr, task, tile, outputs, dy_stride, out_stride, BIAS_ROWS, BIAS_COLUMNS
                )
        else:
            x_ptr = _pointer(row_ptr, X, TYPE, ALIGNED)
            inputs = _number(row_ptr, INPUTS, ALIGNED)
            x_stride = _number(row_ptr, X_STRIDE, ALIGNED)
            tiles_out = tl.cdiv(outputs, OUT)
            for task in range(tasks):
                _matrix_tile(
                    dy_ptr, x_ptr, bounds_ptr, out_ptr, task, tile, outputs, inputs, dy_stride, x_stride, out_stride,
                    tiles_out, tiles_in, OUT, IN, ROWS, GROUP, STAGES, UPCAST,
                )  # fmt: skip
            if partials_ptr is not None:
                tl.debug_barrier()  # a thread may read what another one wrote
                row, column = _place(tile, tiles_out, tiles_in, GROUP)
                sums = _tile_gram(out_ptr, out_stride, outputs, inputs, row * OUT, column * IN, TASKS, T, OUT, IN, PART)
                # Kept in memory from tile to tile: registers are what the product is short of.
                tl.store(partials_ptr + pair, tl.load(partials_ptr + pair) + sums)


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
    tiles_out, tiles_in = cdiv(outputs, tile.outputs), cdiv(inputs, tile.inputs)
    matrix_tiles = 0 if dweight is None else tasks * tiles_out * tiles_in
    bias_tiles = 0 if dbias is None else cdiv(outputs, BIAS_COLUMNS)
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


def grouped_tile(problems: Sequence[Problem], device: torch.device) -> Tile:
    """The tile of a launch for all these problems."""
    if problems[0].dy.dtype == torch.float32:
        return replace(TILE_FP32, num_warps=GROUPED_WARPS)
    if not all(map(_aligned, problems)):
        return replace(TILE_UNALIGNED, num_warps=GROUPED_WARPS)
    return GROUPED if is_hopper_or_newer(device) else replace(GROUPED, num_warps=GROUPED_WARPS)


def _tiles(problem: Problem, tile: Tile) -> int:
    if problem.dweight is None:
        return 0
    outputs, inputs = problem.dy.shape[1], problem.x.shape[1]
    return cdiv(outputs, tile.outputs) * cdiv(inputs, tile.inputs)


def _aligned(problem: Problem) -> bool:
    """Whether every address (in bytes), size and stride (in elements) is a multiple of 16."""
    numbers = []
    for t in problem:
        if t is not None:
            numbers += [t.data_ptr(), *t.shape[1:], *t.stride()[:-1]]
    return not any(number % 16 for number in numbers)


def partial_grams(tasks: int, device: torch.device) -> Tensor | None:
    """An uninitialised buffer for the partial Gram matrices of `weight_gradients`; None for too many tasks."""
    if tasks > MOST_TASKS:
        return None
    size = next_power_of_2(tasks)
    return torch.empty(RESIDENT * multiprocessors(device), size, size, dtype=torch.float32, device=device)


def _part(tasks: int) -> int:
    """The rows of a task's tile, a power of 2, that are multiplied with those of the other tasks at once."""
    return max(16, min(64, 1 << (PARTS // tasks).bit_length() - 1))


def table(problems: Sequence[Problem]) -> tuple[list[list[int]], int]:
    """The rows [FIELDS] of the table that `weight_gradients` reads, biases first, and the number of tiles."""
    tile = grouped_tile(problems, problems[0].dy.device)
    rows, tiles = [], 0
    for dy, _, _, dbias in problems:
        if dbias is not None:
            outputs = dy.shape[1]
            rows.append([dy.data_ptr(), 0, dbias.data_ptr(), outputs, 0, dy.stride(0), 0, dbias.stride(0), tiles, 0])
            tiles += cdiv(outputs, BIAS_COLUMNS)
    for problem in problems:
        dy, x, dweight, _ = problem
        if dweight is not None:
            addresses, sizes = [t.data_ptr() for t in (dy, x, dweight)], [dy.shape[1], x.shape[1]]
            strides = [dy.stride(0), x.stride(0), dweight.stride(0)]
            rows.append([*addresses, *sizes, *strides, tiles, cdiv(x.shape[1], tile.inputs)])
            tiles += _tiles(problem, tile)
    return rows, tiles


def weight_gradients(
    problems: Sequence[Problem], where: Tensor, tiles: int, bounds: Tensor, partials: Tensor | None, add: bool
) -> None:
    """The gradients of all problems, whose dy and x have one dtype, and whose outputs have one.

    `where` is their `table` in device memory, of `tiles` tiles. `partials`, from `partial_grams`, receives each program's
    part of the Gram matrix of the weights as they were written (`add`: in addition to what it holds); biases do not count.
    """
    dy = problems[0].dy
    tile, tasks = grouped_tile(problems, dy.device), bounds.numel() - 1
    out = next(t for t in problems[0][2:] if t is not None)
    programs = RESIDENT * multiprocessors(dy.device)
    _weight_gradients[(programs,)](
        where, bounds, partials, tasks, len(where), tiles, programs,
        TASKS=0 if partials is None else tasks, PROBLEMS=next_power_of_2(len(where)),
        TYPE=TYPES[dy.dtype], OUT_TYPE=TYPES[out.dtype], ALIGNED=all(map(_aligned, problems)),
        T=1 if partials is None else partials.shape[1], ADD=add,
        OUT=tile.outputs, IN=tile.inputs, ROWS=tile.rows, GROUP=GROUP, BIAS_ROWS=BIAS_ROWS, BIAS_COLUMNS=BIAS_COLUMNS,
        PART=_part(tasks), STAGES=tile.num_stages, UPCAST=dy.device.type == "cpu" and dy.dtype == torch.bfloat16,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        **all_registers(dy.device, tile.num_warps),
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Every tile of the table and each dtype, for the ahead-of-time check."""
    sizes = [(100, 36), (384, 384), (1536, 384), (768, 768), (2304, 768), (3072, 768)]
    settings = [(torch.float16, 768, 768), *((torch.bfloat16, *size) for size in sizes), (torch.float32, 768, 768)]
    for dtype, outputs, inputs in settings:
        dy, x = meta(2816, outputs, dtype=dtype), meta(2816, inputs, dtype=dtype)
        bounds = meta(4, dtype=torch.int32)
        for out in (torch.float32, torch.bfloat16):
            dweight, dbias = meta(3, outputs, inputs, dtype=out), meta(3, outputs, dtype=out)
            label = f"{str(dtype)[6:]} {outputs}x{inputs} -> {str(out)[6:]}"
            yield Launch(label, partial(linear_gradients, dy, x, bounds, dweight, dbias))
    for tasks, outputs, inputs, dtype in [
        (3, 100, 36, torch.bfloat16), (3, 384, 384, torch.bfloat16), (1, 768, 768, torch.bfloat16),
        (3, 768, 768, torch.bfloat16), (8, 768, 768, torch.bfloat16), (3, 768, 768, torch.float32),
    ]:  # fmt: skip
        x, dy = meta(2816, inputs, dtype=dtype), meta(2816, outputs, dtype=dtype)
        problem = Problem(dy, x, meta(tasks, outputs, inputs, dtype=dtype), meta(tasks, outputs, dtype=dtype))
        problems = [problem] * (12 if outputs == 768 else 1)
        bounds = meta(tasks + 1, dtype=torch.int32)
        for add in (True, False):  # False stores zeros first
            yield Launch(
                f"grouped {str(dtype)[6:]} {outputs}x{inputs}, {tasks} tasks add={add:d}",
                partial(_all_of, problems, bounds, add),
                wide=dtype == torch.bfloat16 and outputs % 16 == 0,
                spilled=SPILLED,
            )


def _all_of(problems: Sequence[Problem], bounds: Tensor, add: bool) -> None:
    rows, tiles = table(problems)
    where = meta(len(rows), FIELDS.value, dtype=torch.int64)
    weight_gradients(problems, where, tiles, bounds, partial_grams(bounds.numel() - 1, where.device), add)
