# SPDX-License-Identifier: Apache-2.0
"""G [T, T] = J J^T in two launches, without atomics: each program sums its own columns, then the sums are added in order.

Tasks form groups of 8 (smaller for fewer tasks). A program of the first launch multiplies every task of one group with
every task of another, column by column. Each thread keeps the sums of its columns in registers. With up to 8 tasks, J
is read once. With more, each pair of groups has its own programs. Those for the same columns run at the same time, so
all but the first read from the L2 cache. Bytes a column: e T (e bytes an element of J).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import TYPES, cdiv, multiprocessors, next_power_of_2
from minbert_fast.kernels.launches import Launch, meta

# Tasks a group: columns a program takes at a time, and its warps. A thread keeps group^2 x columns / threads sums.
LAUNCHES = {1: (2048, 4), 2: (1024, 4), 4: (512, 4), 8: (128, 4)}
PROGRAMS = 4  # a multiprocessor, for each pair of groups


@triton.jit
def _gram_partials(
    j_ptr,  # [tasks, columns]
    partials_ptr,  # [programs, tasks, tasks] fp32; pairs (a, b) whose group of a comes after that of b are not written
    j_stride, columns, tasks, programs,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The pair of groups (first <= second), counted along the rows of the upper triangle.
    first = 0
    rest = tl.program_id(0)
    for row in tl.static_range(GROUPS):
        below = (first == row) & (rest >= GROUPS - row)
        rest = tl.where(below, rest - (GROUPS - row), rest)
        first = tl.where(below, row + 1, first)
    second = first + rest

    a = first * GROUP + tl.arange(0, GROUP)
    b = second * GROUP + tl.arange(0, GROUP)
    row_a = a.to(tl.int64)[:, None, None] * j_stride
    row_b = b.to(tl.int64)[None, :, None] * j_stride
    program = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((GROUP, GROUP, COLUMNS), tl.float32)
    for start in range(program * COLUMNS, columns, programs * COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, None, :]
        inside = column < columns
        x = tl.load(j_ptr + row_a + column, mask=(a < tasks)[:, None, None] & inside, other=0.0).to(tl.float32)
        y = tl.load(j_ptr + row_b + column, mask=(b < tasks)[None, :, None] & inside, other=0.0).to(tl.float32)
        sums += x * y
    at = partials_ptr + (program * tasks + a.to(tl.int64)[:, None]) * tasks + b[None, :]
    tl.store(at, tl.sum(sums, 2), mask=(a < tasks)[:, None] & (b < tasks)[None, :])


@triton.jit
def _finish_gram(
    partials_ptr,  # [programs, pitch, pitch] fp32
    out_ptr,  # [tasks, tasks] fp32
    tasks, pitch, programs,
    ACCUMULATE: tl.constexpr,
    PROGRAMS: tl.constexpr,  # programs, rounded up to a power of 2
):  # fmt: skip
    a = tl.program_id(0)
    b = tl.program_id(1)
    if a <= b:
        program = tl.arange(0, PROGRAMS)
        at = partials_ptr + program * pitch * pitch + a * pitch + b
        total = tl.sum(tl.load(at, mask=program < programs, other=0.0).to(tl.float64), 0)
        if ACCUMULATE:
            total += tl.load(out_ptr + a * tasks + b).to(tl.float64)
        tl.store(out_ptr + a * tasks + b, total.to(tl.float32))
        tl.store(out_ptr + b * tasks + a, total.to(tl.float32))


def gram(J: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [T, T] fp32 = J J^T, or += it, from J [T, P] (any task stride, fp32 or bf16)."""
    tasks, columns = J.shape
    group = min(8, next_power_of_2(tasks))
    groups = cdiv(tasks, group)
    tile, warps = LAUNCHES[group]
    programs = max(1, min(cdiv(columns, tile), PROGRAMS * multiprocessors(J.device)))
    partials = torch.empty(programs, tasks, tasks, dtype=torch.float32, device=J.device)
    _gram_partials[(groups * (groups + 1) // 2, programs)](
        J, partials, J.stride(0), columns, tasks, programs, GROUPS=groups, GROUP=group, COLUMNS=tile,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    finish(partials, out, accumulate)


def finish(partials: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out [T, T] = the sum of partials [programs, T or more, T or more] over the programs, in fp64; or += it."""
    (programs, pitch, _), tasks = partials.shape, out.shape[0]
    _finish_gram[(tasks, tasks)](
        partials, out, tasks, pitch, programs, ACCUMULATE=accumulate, PROGRAMS=next_power_of_2(programs),
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


#: Columns of the table of pieces.
POINTER, STRIDE, COUNT, FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FIELDS = tl.constexpr(4)


@triton.jit
def _gram_pieces(
    table_ptr,  # [pieces, FIELDS] int64
    partials_ptr,  # [programs, T, T] fp32
    tasks, pieces, blocks, programs,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, PIECES: tl.constexpr, T: tl.constexpr, COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    piece = tl.arange(0, PIECES)
    firsts = tl.load(table_ptr + piece * FIELDS + FIRST, mask=piece < pieces, other=2147483647)
    a = tl.arange(0, T)[:, None, None]
    b = tl.arange(0, T)[None, :, None]
    sums = tl.zeros((T, T, COLUMNS), tl.float32)
    for block in range(program, blocks, programs):
        row_ptr = table_ptr + FIELDS * (tl.sum((firsts <= block).to(tl.int32), 0) - 1)
        pointer = tl.load(row_ptr + POINTER).to(tl.pointer_type(TYPE))
        stride = tl.load(row_ptr + STRIDE)
        count = tl.load(row_ptr + COUNT)
        if ALIGNED:  # each number needs its own hint, or memory moves by single elements
            pointer = tl.multiple_of(pointer, 16)
            stride = tl.multiple_of(stride, 16)
            count = tl.multiple_of(count, 16)
        first = (block - tl.load(row_ptr + FIRST)) * COLUMNS
        column = first + tl.arange(0, COLUMNS)[None, None, :]
        inside = column < count
        x = tl.load(pointer + a * stride + column, mask=(a < tasks) & inside, other=0.0).to(tl.float32)
        y = tl.load(pointer + b * stride + column, mask=(b < tasks) & inside, other=0.0).to(tl.float32)
        sums += x * y
    at = partials_ptr + program * T * T + tl.arange(0, T)[:, None] * T + tl.arange(0, T)[None, :]
    total = tl.sum(sums, 2)
    if ADD:
        total += tl.load(at)
    tl.store(at, total)


def pieces_table(pieces: Sequence[Tensor]) -> tuple[list[list[int]], int]:
    """The rows of the table that `gram_pieces` reads, and the number of its blocks. Pieces [T, columns], any task stride."""
    columns, _ = LAUNCHES[next_power_of_2(pieces[0].shape[0])]
    rows, blocks = [], 0
    for piece in pieces:
        rows.append([piece.data_ptr(), piece.stride(0), piece.shape[1], blocks])
        blocks += cdiv(piece.shape[1], columns)
    return rows, blocks


def gram_pieces(pieces: Sequence[Tensor], where: Tensor, blocks: int, partials: Tensor, add: bool) -> None:
    """Each program's part [T, T] of the Gram matrix of the pieces, all of one dtype; `add`: to what `partials` holds.

    `where` is their `pieces_table` in device memory; partials [programs, T, T], T a power of 2 up to 8.
    """
    programs, size, _ = partials.shape
    columns, warps = LAUNCHES[size]
    numbers = [number for piece in pieces for number in (piece.data_ptr(), piece.stride(0), piece.shape[1])]
    _gram_pieces[(programs,)](
        where, partials, pieces[0].shape[0], len(where), blocks, programs,
        TYPE=TYPES[pieces[0].dtype], ALIGNED=not any(number % 16 for number in numbers),
        PIECES=next_power_of_2(len(where)), T=size, COLUMNS=columns, ADD=add, num_warps=warps,
        enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Each launch setting and several groups, fp32 and bf16 J, for the ahead-of-time check."""
    for tasks in (1, 2, 3, 8, 16, 64):
        for dtype in (torch.float32, torch.bfloat16):
            J, out = meta(tasks, 1 << 20, dtype=dtype), meta(tasks, tasks)
            yield Launch(f"{tasks} tasks {str(dtype)[6:]}", partial(gram, J, out, tasks == 3))
    for tasks in (1, 3, 8):
        pieces = [meta(tasks, 768, dtype=torch.bfloat16)] * 60
        rows, blocks = pieces_table(pieces)
        size = next_power_of_2(tasks)
        where, partials = meta(len(rows), FIELDS.value, dtype=torch.int64), meta(264, size, size)
        call = partial(gram_pieces, pieces, where, blocks, partials, True)
        yield Launch(f"pieces of {tasks} tasks bfloat16", call, needs="ld.global.v4.b32")
