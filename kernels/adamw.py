# SPDX-License-Identifier: Apache-2.0
"""One AdamW step over flat parameters, joined with surgery's combination: g = w J lives in registers only.

Everything that changes from step to step is read from the device, so that a captured graph follows a schedule:
`scalars` is fp32 [4] = (learning rate, step from 1, gradient scale, skip), as minbert_fast/ops/native/surgery.py lays
it out. Where skip is not 0 (a gradient that is not finite), nothing changes.

    g = scale sum_t w[t] J[t],  m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    p = after (before p - rate m / (root sqrt(v) + eps))
      course: rate = lr sqrt(1 - beta2^t) / (1 - beta1^t), root = 1, decay after it (Kingma & Ba 2014, section 2)
      torch:  rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t), decay before it (Loshchilov & Hutter 2019)

Memory traffic is all there is: 4 T + 24 bytes a parameter for fp32 J, and 2 for the bf16 copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.launches import Launch


@dataclass(frozen=True)
class Options:
    """What does not change while a parameter group trains; `lr_factor` multiplies the learning rate of the scalars."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    correct_bias: bool = True
    torch_style: bool = False
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Tile:
    """Parameters a program updates: two 16-byte loads a thread from each of p, m, v and every J[t]."""

    elements: int = 1024
    num_warps: int = 4


TILE = Tile()


@triton.jit
def _one_minus_power(step, log_beta):
    """1 - beta^step without cancellation where beta^step is near 1; fp32."""
    x = step * log_beta
    series = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0)))
    near = -x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * series)))
    return tl.where(x > -0.3, near, 1.0 - tl.exp(x))


@triton.jit
def _combined(j_ptr, w_ptr, j_stride, offsets, mask, T: tl.constexpr):
    """sum_t w[t] J[t] at `offsets`, tasks in their order; rows of weight 0 are not read."""
    gradient = tl.zeros(offsets.shape, tl.float32)
    for t in tl.static_range(T):
        if w_ptr is None:
            gradient += tl.load(j_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            weight = tl.load(w_ptr + t)
            row = j_ptr + t * j_stride + offsets
            wanted = mask & (tl.broadcast_to(weight, offsets.shape) != 0.0)
            gradient += weight * tl.load(row, mask=wanted, other=0.0).to(tl.float32)
    return gradient


@triton.jit
def _update(
    gradient,
    p_ptr,
    m_ptr,
    v_ptr,
    copy_ptr,
    scalars_ptr,
    offsets,
    mask,
    lr_factor,
    log_beta1,
    log_beta2,
    weight_decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CORRECT_BIAS: tl.constexpr,
    TORCH_STYLE: tl.constexpr,
):
    lr = tl.load(scalars_ptr) * lr_factor
    step = tl.load(scalars_ptr + 1)
    scale = tl.load(scalars_ptr + 2)
    p = tl.load(p_ptr + offsets, mask=mask)
    m = tl.load(m_ptr + offsets, mask=mask)
    v = tl.load(v_ptr + offsets, mask=mask)
    if CORRECT_BIAS:
        correction1 = _one_minus_power(step, log_beta1)
        correction2 = tl.sqrt(_one_minus_power(step, log_beta2))
    else:
        correction1 = 1.0
        correction2 = 1.0
    decay = 1.0 - lr * weight_decay
    g = gradient * scale
    m = BETA1 * m + (1.0 - BETA1) * g
    v = BETA2 * v + (1.0 - BETA2) * g * g
    if TORCH_STYLE:
        p = p * decay - lr / correction1 * m / (tl.sqrt(v) / correction2 + EPS)
    else:
        p = (p - lr * correction2 / correction1 * m / (tl.sqrt(v) + EPS)) * decay
    tl.store(p_ptr + offsets, p, mask=mask)
    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offsets, p.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adamw(
    p_ptr,  # [count] fp32, as m and v
    m_ptr,
    v_ptr,
    copy_ptr,  # [count] bf16, or None
    j_ptr,  # [T, count]
    w_ptr,  # [T] fp32, or None: one task of weight 1
    scalars_ptr,  # [4] fp32
    j_stride,
    count,
    lr_factor,
    log_beta1,
    log_beta2,
    weight_decay,
    T: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CORRECT_BIAS: tl.constexpr,
    TORCH_STYLE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    if tl.load(scalars_ptr + 3) == 0.0:
        offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        mask = offsets < count
        _update(
            _combined(j_ptr, w_ptr, j_stride, offsets, mask, T),
            p_ptr,
            m_ptr,
            v_ptr,
            copy_ptr,
            scalars_ptr,
            offsets,
            mask,
            lr_factor,
            log_beta1,
            log_beta2,
            weight_decay,
            BETA1,
            BETA2,
            EPS,
            CORRECT_BIAS,
            TORCH_STYLE,
        )


@triton.jit
def _adamw_rows(
    p_ptr,  # [rows, WIDTH] fp32, as m and v
    m_ptr,
    v_ptr,
    copy_ptr,  # [rows, WIDTH] bf16, or None
    row_slot_ptr,  # [rows] int32: the row's place among the slots, -1 for none
    j_ptr,  # [T, slots, WIDTH]
    w_ptr,  # [T] fp32, or None: one task of weight 1
    scalars_ptr,  # [4] fp32
    j_stride,
    rows,
    slots,
    lr_factor,
    log_beta1,
    log_beta2,
    weight_decay,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    CORRECT_BIAS: tl.constexpr,
    TORCH_STYLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    if tl.load(scalars_ptr + 3) == 0.0:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (columns < WIDTH)[None, :]
        slot = tl.load(row_slot_ptr + row, mask=row < rows, other=-1)
        touched = (slot >= 0) & (slot < slots)
        at = slot.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        _update(
            _combined(j_ptr, w_ptr, j_stride, at, mask & touched[:, None], T),
            p_ptr,
            m_ptr,
            v_ptr,
            copy_ptr,
            scalars_ptr,
            row.to(tl.int64)[:, None] * WIDTH + columns[None, :],
            mask,
            lr_factor,
            log_beta1,
            log_beta2,
            weight_decay,
            BETA1,
            BETA2,
            EPS,
            CORRECT_BIAS,
            TORCH_STYLE,
        )


def _arguments(options: Options) -> tuple[dict[str, float], dict[str, float | bool]]:
    """Options as the kernels' runtime numbers and compile-time constants."""
    beta1, beta2 = options.betas
    if not (0.0 < beta1 < 1.0 and 0.0 < beta2 < 1.0):
        raise ValueError(f"betas must lie strictly between 0 and 1, not {options.betas}")
    numbers = {
        "lr_factor": options.lr_factor,
        "log_beta1": math.log(beta1),
        "log_beta2": math.log(beta2),
        "weight_decay": options.weight_decay,
    }
    constants = {
        "BETA1": beta1,
        "BETA2": beta2,
        "EPS": options.eps,
        "CORRECT_BIAS": options.correct_bias,
        "TORCH_STYLE": options.torch_style,
    }
    return numbers, constants


def _tasks(gradient: Tensor, w: Tensor | None) -> int:
    tasks = gradient.shape[0]
    if (1 if w is None else w.numel()) != tasks:
        raise ValueError(f"{tasks} tasks' gradients need {tasks} weights (none for a single one)")
    return tasks


def adamw(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    gradient: Tensor,
    w: Tensor | None,
    copy: Tensor | None,
    scalars: Tensor,
    options: Options,
) -> None:
    """Updates p, m, v [P] fp32 in place, and `copy` [P] (bf16, the new p; None: not wanted).

    `gradient` is J [T, P] (any task stride, fp32 or bf16) with weights w [T] fp32; w None: a gradient [1, P].
    """
    tasks = _tasks(gradient, w)
    numbers, constants = _arguments(options)
    count = p.numel()
    if count:
        _adamw[(triton.cdiv(count, TILE.elements),)](
            p,
            m,
            v,
            copy,
            gradient,
            w,
            scalars,
            gradient.stride(0),
            count,
            **numbers,
            T=tasks,
            **constants,
            ELEMENTS=TILE.elements,
            num_warps=TILE.num_warps,
            enable_fp_fusion=True,
        )


def adamw_rows(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    row_slot: Tensor,
    gradient: Tensor,
    w: Tensor | None,
    copy: Tensor | None,
    scalars: Tensor,
    options: Options,
) -> None:
    """The same, exactly, for a table p, m, v [V, H] of which few rows have a gradient.

    Row r's gradient is slot row_slot[r] (int32 [V], -1 for none) of `gradient` [T, U, H]; all moments decay.
    """
    tasks = _tasks(gradient, w)
    numbers, constants = _arguments(options)
    rows, width = p.shape
    columns = next((size for size in (256, 128) if width % size == 0), min(256, triton.next_power_of_2(width)))
    tile_rows = TILE.elements // columns
    _adamw_rows[(triton.cdiv(rows, tile_rows), triton.cdiv(width, columns))](
        p,
        m,
        v,
        copy,
        row_slot,
        gradient,
        w,
        scalars,
        gradient.stride(0),
        rows,
        gradient.shape[1],
        **numbers,
        T=tasks,
        WIDTH=width,
        **constants,
        ROWS=tile_rows,
        COLUMNS=columns,
        num_warps=TILE.num_warps,
        enable_fp_fusion=True,
    )


def launches() -> Iterator[Launch]:
    """Dense and by rows, one task and several, fp32 and bf16 J, both styles, for the ahead-of-time check."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    options, scalars, count, width = Options(weight_decay=0.01), empty(4), 1 << 20, 768
    state = empty(count), empty(count), empty(count)
    copy = empty(count, dtype=torch.bfloat16)
    yield Launch("plain", partial(adamw, *state, empty(1, count), None, None, scalars, options))
    torch_style = Options(torch_style=True)
    yield Launch("plain, torch", partial(adamw, *state, empty(1, count), None, copy, scalars, torch_style))
    for tasks in (2, 3, 8):
        for dtype in (torch.float32, torch.bfloat16):
            j = empty(tasks, count, dtype=dtype)
            label = f"w J, {tasks} tasks {str(dtype)[6:]}"
            yield Launch(label, partial(adamw, *state, j, empty(tasks), copy, scalars, options))
    for width in (768, 384, 100):
        table = empty(30522, width), empty(30522, width), empty(30522, width)
        slots, j = empty(30522, dtype=torch.int32), empty(3, 2816, width)
        image = empty(30522, width, dtype=torch.bfloat16)
        yield Launch(f"rows of {width}", partial(adamw_rows, *table, slots, j, empty(3), image, scalars, options))
