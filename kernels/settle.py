# SPDX-License-Identifier: Apache-2.0
"""The decisions between a step's Gram matrix and its update, in one launch of one program.

Norm of the combined gradient from w G w, clipping scale, tasks that are not finite, whether to skip the step, step counts:
a few hundred numbers, for which every launch of a library's elementwise kernels costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import next_power_of_2
from minbert_fast.kernels.launches import Launch, meta


@triton.jit
def _settle(
    values_ptr,  # [tasks] fp32
    gram_ptr,  # [rows, rows] fp32
    w_ptr,  # [rows] fp32
    heads_ptr,  # [] fp32
    scalars_ptr,  # [labels, 4] fp32: learning rate, step, gradient scale, skip
    taking_ptr,  # [labels] fp32, 0 or 1
    norm_ptr,  # [1] fp32
    nonfinite_ptr,  # [tasks] bytes
    skip_ptr,  # [1] byte
    tasks, rows, labels, max_norm,
    APART: tl.constexpr, T: tl.constexpr, R: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    task = tl.arange(0, T)
    value = tl.load(values_ptr + task, mask=task < tasks, other=0.0)
    bad = (tl.abs(value) < float("inf")) == 0  # infinity or NaN
    if APART:
        own = tl.load(gram_ptr + task * rows + task, mask=task < tasks, other=0.0)
        bad = bad | ((tl.abs(own) < float("inf")) == 0)
    a = tl.arange(0, R)[:, None]
    b = tl.arange(0, R)[None, :]
    w_a = tl.load(w_ptr + a, mask=a < rows, other=0.0)
    w_b = tl.load(w_ptr + b, mask=b < rows, other=0.0)
    used = (w_a != 0.0) & (w_b != 0.0)  # a row of weight 0 is ignored, even if not finite
    products = tl.load(gram_ptr + a * rows + b, mask=used, other=0.0)
    square = tl.sum(tl.sum(w_a * w_b * products, 1), 0)
    heads = tl.load(heads_ptr)
    square += heads * heads
    norm = tl.sqrt(tl.where(square < 0.0, 0.0, square))
    finite = tl.abs(norm) < float("inf")
    scale = tl.where(max_norm > 0.0, tl.minimum(max_norm / (norm + 1e-6), 1.0), 1.0)
    scale = tl.where(finite, scale, 1.0)
    skip = (tl.max(bad.to(tl.int32), 0) > 0) | (finite == 0)
    label = tl.arange(0, LABELS)
    mask = label < labels
    step = tl.load(scalars_ptr + label * 4 + 1, mask=mask, other=0.0)
    taking = tl.load(taking_ptr + label, mask=mask, other=0.0)
    flag = tl.where(skip, 1.0, 0.0)
    ones = tl.full((LABELS,), 1.0, tl.float32)
    tl.store(scalars_ptr + label * 4 + 1, step + taking * (1.0 - flag), mask=mask)
    tl.store(scalars_ptr + label * 4 + 2, ones * scale, mask=mask)
    tl.store(scalars_ptr + label * 4 + 3, ones * flag, mask=mask)
    tl.store(norm_ptr, norm)
    tl.store(nonfinite_ptr + task, bad.to(tl.uint8), mask=task < tasks)
    tl.store(skip_ptr, skip.to(tl.uint8))


def settle(
    values: Tensor, gram: Tensor, w: Tensor, heads: Tensor, max_norm: float, scalars: Tensor, taking: Tensor,
    norm: Tensor, nonfinite: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """See minbert_fast/ops/settle.py; `heads` [] is the norm of the heads' gradient, the last two are bool."""
    tasks, rows, labels = values.numel(), w.numel(), scalars.shape[0]
    _settle[(1,)](
        values, gram, w, heads, scalars, taking, norm, nonfinite.view(torch.uint8), skip.view(torch.uint8),
        tasks, rows, labels, float(max_norm), APART=rows == tasks, T=next_power_of_2(tasks),
        R=next_power_of_2(rows), LABELS=next_power_of_2(labels), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Gradients apart and summed, for the ahead-of-time check."""
    for rows in (1, 3, 64):
        tasks = max(3, rows)
        flags = meta(tasks, dtype=torch.bool)
        vectors = (meta(tasks), meta(rows, rows), meta(rows), meta())
        call = partial(settle, *vectors, 1.0, meta(4, 4), meta(4), meta(1), flags, flags[:1])
        yield Launch(f"{tasks} tasks, {rows} rows", call)
