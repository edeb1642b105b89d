# SPDX-License-Identifier: Apache-2.0
"""One AdamW step over flat parameters and surgery's combination in one kernel: g = w J stays in registers.

The kernel reads the numbers of a step from the device, so that a captured graph follows a schedule: `scalars` is fp32
[4] = (learning rate, step from 1, gradient scale, skip). If skip is not 0, nothing changes.

    g = scale sum_t w[t] J[t],  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    p = (1 - lr decay) (p - rate m / (sqrt(v) + eps)),  rate = lr sqrt(1 - beta2^t) / (1 - beta1^t)

Bytes a parameter: e T + 24, and 2 for the bf16 copy (e bytes an element of J).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import cdiv, next_power_of_2
from minbert_fast.kernels.combine import ELEMENTS, NUM_WARPS, combined
from minbert_fast.kernels.launches import Launch, meta


@triton.jit
def _one_minus_power(step, log_beta):
    """1 - beta^step without cancellation where beta^step is near 1; fp32."""
    x = tl.maximum(step * log_beta, -80.0)  # 1 - e^-80 is 1 in fp32
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0)))
    near = -x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series)))
    return tl.where(x > -0.3, near, 1.0 - tl.exp(x))


@triton.jit
def _adamw(
    j_ptr,  # [T, count], or [T, slots, WIDTH] by rows
    w_ptr,  # [T] fp32, or None: one task of weight 1
    p_ptr,  # [count] fp32, as m and v; by rows [rows, WIDTH]
    m_ptr,
    v_ptr,
    scalars_ptr,  # [4] fp32
    copy_ptr,  # bf16 of p's shape, or None
    row_slot_ptr,  # [rows] int32: the slot of the row's gradient, -1 for none; or None: dense
    j_stride, count, slots, lr_factor, log_beta1, log_beta2, weight_decay,
    T: tl.constexpr, WIDTH: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    CORRECT_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if tl.load(scalars_ptr + 3) == 0.0:
        if row_slot_ptr is None:
            offsets = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
            mask = offsets < count
            source = offsets
            touched = mask
        else:
            row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            offsets = row[:, None] * WIDTH + column[None, :]
            mask = (row < count // WIDTH)[:, None] & (column < WIDTH)[None, :]
            slot = tl.load(row_slot_ptr + row, mask=row < count // WIDTH, other=-1)
            source = slot.to(tl.int64)[:, None] * WIDTH + column[None, :]
            touched = mask & ((slot >= 0) & (slot < slots))[:, None]
        lr = tl.load(scalars_ptr) * lr_factor
        step = tl.load(scalars_ptr + 1)
        g = combined(j_ptr, w_ptr, j_stride, source, touched, T) * tl.load(scalars_ptr + 2)
        p = tl.load(p_ptr + offsets, mask=mask)
        m = tl.load(m_ptr + offsets, mask=mask)
        v = tl.load(v_ptr + offsets, mask=mask)
        rate = lr
        if CORRECT_BIAS:
            rate = lr * tl.sqrt(_one_minus_power(step, log_beta2)) / _one_minus_power(step, log_beta1)
        m = BETA1 * m + (1.0 - BETA1) * g
        v = BETA2 * v + (1.0 - BETA2) * g * g
        p = (p - rate * m / (tl.sqrt(v) + EPS)) * (1.0 - lr * weight_decay)
        tl.store(p_ptr + offsets, p, mask=mask)
        tl.store(m_ptr + offsets, m, mask=mask)
        tl.store(v_ptr + offsets, v, mask=mask)
        if copy_ptr is not None:
            tl.store(copy_ptr + offsets, p.to(copy_ptr.dtype.element_ty), mask=mask)


def adamw(
    J: Tensor, w: Tensor | None, p: Tensor, m: Tensor, v: Tensor, scalars: Tensor, copy: Tensor | None,
    row_slot: Tensor | None, lr_factor: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    correct_bias: bool,
) -> None:  # fmt: skip
    """Updates p, m, v and `copy` in place: the fields of AdamWStep (minbert_fast/ops/adamw.py), in their order."""
    count, width = p.numel(), p.shape[-1]
    if not count:
        return
    if row_slot is None:
        rows, columns, grid = 1, ELEMENTS, (cdiv(count, ELEMENTS),)
    else:
        columns = next((size for size in (256, 128) if width % size == 0), min(256, next_power_of_2(width)))
        rows = ELEMENTS // columns
        grid = (cdiv(p.shape[0], rows), cdiv(width, columns))
    log_betas = (math.log(beta) if beta else -100.0 for beta in (beta1, beta2))
    _adamw[grid](
        J, w, p, m, v, scalars, copy, row_slot, J.stride(0), count, J.shape[1], lr_factor, *log_betas, weight_decay,
        T=J.shape[0], WIDTH=1 if row_slot is None else width, BETA1=beta1, BETA2=beta2, EPS=eps,
        CORRECT_BIAS=correct_bias, ROWS=rows, COLUMNS=columns, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Dense and by rows, one task and several, fp32 and bf16 J, for the ahead-of-time check."""

    def call(J: Tensor, *shape: int, weighted: bool = True, row_slot: Tensor | None = None) -> partial[None]:
        p, scalars = meta(*shape), meta(4)
        w, copy = (meta(J.shape[0]), meta(*shape, dtype=torch.bfloat16)) if weighted else (None, None)
        return partial(adamw, J, w, p, p, p, scalars, copy, row_slot, 1.0, 0.9, 0.999, 1e-6, 0.01, True)

    count, words = 1 << 20, 30522
    yield Launch("plain", call(meta(1, count), count, weighted=False))
    for tasks in (2, 3, 8):
        for dtype in (torch.float32, torch.bfloat16):
            yield Launch(f"w J, {tasks} tasks {str(dtype)[6:]}", call(meta(tasks, count, dtype=dtype), count))
    slots = meta(words, dtype=torch.int32)
    for width in (100, 384, 768):
        yield Launch(f"rows of {width}", call(meta(3, 2816, width), words, width, row_slot=slots))
