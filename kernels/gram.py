# SPDX-License-Identifier: Apache-2.0
"""G [T, T] = J J^T in two launches, without atomics: each program sums its own columns, then the sums are added in order.

Tasks form groups of 8 (smaller for fewer tasks). A program of the first launch multiplies every task of one group with
every task of another, column by column. Each thread keeps the sums of its columns in registers. With up to 8 tasks, J
is read once. With more, each pair of groups has its own programs. Those for the same columns run at the same time, so
all but the first read from the L2 cache. Bytes a column: e T (e bytes an element of J).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import multiprocessors
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
    partials_ptr,  # [programs, tasks, tasks] fp32
    out_ptr,  # [tasks, tasks] fp32
    tasks, programs,
    ACCUMULATE: tl.constexpr,
    PROGRAMS: tl.constexpr,  # programs, rounded up to a power of 2
):  # fmt: skip
    a = tl.program_id(0)
    b = tl.program_id(1)
    if a <= b:
        program = tl.arange(0, PROGRAMS)
        at = partials_ptr + program * tasks * tasks + a * tasks + b
        total = tl.sum(tl.load(at, mask=program < programs, other=0.0).to(tl.float64), 0)
        if ACCUMULATE:
            total += tl.load(out_ptr + a * tasks + b).to(tl.float64)
        tl.store(out_ptr + a * tasks + b, total.to(tl.float32))
        tl.store(out_ptr + b * tasks + a, total.to(tl.float32))


def gram(J: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [T, T] fp32 = J J^T, or += it, from J [T, P] (any task stride, fp32 or bf16)."""
    tasks, columns = J.shape
    group = min(8, triton.next_power_of_2(tasks))
    groups = triton.cdiv(tasks, group)
    tile, warps = LAUNCHES[group]
    programs = max(1, min(triton.cdiv(columns, tile), PROGRAMS * multiprocessors(J.device)))
    partials = torch.empty(programs, tasks, tasks, dtype=torch.float32, device=J.device)
    _gram_partials[(groups * (groups + 1) // 2, programs)](
        J, partials, J.stride(0), columns, tasks, programs, GROUPS=groups, GROUP=group, COLUMNS=tile,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    _finish_gram[(tasks, tasks)](
        partials, out, tasks, programs, ACCUMULATE=accumulate, PROGRAMS=triton.next_power_of_2(programs),
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Each launch setting and several groups, fp32 and bf16 J, for the ahead-of-time check."""
    for tasks in (1, 2, 3, 8, 16, 64):
        for dtype in (torch.float32, torch.bfloat16):
            J, out = meta(tasks, 1 << 20, dtype=dtype), meta(tasks, tasks)
            yield Launch(f"{tasks} tasks {str(dtype)[6:]}", partial(gram, J, out, tasks == 3))
