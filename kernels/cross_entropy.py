# SPDX-License-Identifier: Apache-2.0
"""Mean cross-entropies of a few thousand scores, and their gradients, in one launch of one program.

A task's batch has some ten examples. A library's kernels for the terms of a loss and of its gradient, a launch each, cost
more than the arithmetic.
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

TILE = 1024  # scores at a time


@triton.jit
def _binary_cross_entropy(
    scores_ptr,  # [count]
    targets_ptr,  # [count]
    loss_ptr,  # []
    gradient_ptr,  # [count]
    count,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < count
        s = tl.load(scores_ptr + index, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(targets_ptr + index, mask=mask, other=0.0).to(tl.float32)
        x = tl.exp(-tl.abs(s))
        above = 1.0 + x
        rounded = above == 1.0
        # log(1 + x) without the error of rounding 1 + x (Goldberg 1991, theorem 4)
        log = tl.where(rounded, x, tl.log(above) * x / tl.where(rounded, 1.0, above - 1.0))
        total += tl.where(mask, tl.maximum(s, 0.0) - s * t + log, 0.0)
        gradient = (tl.where(s < 0.0, x, 1.0) / above - t) / count
        tl.store(gradient_ptr + index, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(loss_ptr, (tl.sum(total, 0) / count).to(loss_ptr.dtype.element_ty))


@triton.jit
def _cross_entropy(
    scores_ptr,  # [rows, CLASSES]
    labels_ptr,  # [rows] int64
    loss_ptr,  # []
    gradient_ptr,  # [rows, CLASSES]
    rows,
    SMOOTHING: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        valid = row < rows
        mask = valid[:, None] & (column < CLASSES)
        offsets = row[:, None] * CLASSES + column
        s = tl.load(scores_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        s = tl.where(valid[:, None], s, 0.0)
        label = tl.load(labels_ptr + row, mask=valid, other=0)
        s -= tl.max(s, 1)[:, None]
        share = tl.exp(s)
        together = tl.sum(share, 1)[:, None]
        surprise = tl.log(together) - s  # -log p
        own = column == label[:, None]
        each = tl.sum(tl.where(own, surprise, 0.0), 1)
        gradient = share / together - tl.where(own, 1.0 - SMOOTHING, 0.0)
        if SMOOTHING > 0.0:
            each = (1.0 - SMOOTHING) * each + SMOOTHING / CLASSES * tl.sum(tl.where(mask, surprise, 0.0), 1)
            gradient -= SMOOTHING / CLASSES
        each = tl.where((label >= 0) & (label < CLASSES), each, float("nan"))
        total += tl.where(valid, each, 0.0)
        tl.store(gradient_ptr + offsets, (gradient / rows).to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(loss_ptr, (tl.sum(total, 0) / rows).to(loss_ptr.dtype.element_ty))


def binary_cross_entropy_with_gradient(scores: Tensor, targets: Tensor, loss: Tensor, gradient: Tensor) -> None:
    """scores, targets [...] -> loss [], gradient [...]."""
    block = min(TILE, next_power_of_2(scores.numel()))
    _binary_cross_entropy[(1,)](
        scores, targets, loss, gradient, scores.numel(), BLOCK=block, num_warps=4, enable_fp_fusion=True
    )


def cross_entropy_with_gradient(
    scores: Tensor, labels: Tensor, smoothing: float, loss: Tensor, gradient: Tensor
) -> None:
    """scores [n, C], labels [n] int64 -> loss [], gradient [n, C]. A label that is no class makes the loss NaN."""
    rows, classes = scores.shape
    block = next_power_of_2(classes)
    together = min(max(1, TILE // block), next_power_of_2(rows))
    _cross_entropy[(1,)](
        scores, labels, loss, gradient, rows, SMOOTHING=float(smoothing), CLASSES=classes, ROWS=together, BLOCK=block,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """A batch of the course's tasks and the largest ones, for the ahead-of-time check."""
    for rows, classes in ((32, 5), (256, 31), (8, 1024)):
        scores, labels = meta(rows, classes), meta(rows, dtype=torch.int64)
        for smoothing in (0.0, 0.1):
            call = partial(cross_entropy_with_gradient, scores, labels, smoothing, meta(), scores)
            yield Launch(f"classes {rows}x{classes} smoothing={smoothing}", call)
    for count in (32, 8192):
        scores = meta(count)
        call = partial(binary_cross_entropy_with_gradient, scores, scores, meta(), scores)
        yield Launch(f"binary {count}", call)
