# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery and AdamW again in fp64, the obvious way, apart from the package: the ground truth of the tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pcgrad(gradients: Tensor, orders: Sequence[Sequence[int]], mean: bool = False) -> Tensor:
    """Algorithm 1 of arXiv:2001.06782 on whole fp64 vectors [T, P]; `orders[i]` is task i's order of the others."""
    originals = [row.double() for row in gradients]
    projected = []
    for i, gradient in enumerate(originals):
        g = gradient.clone()
        for j in orders[i]:
            if j == i:
                continue
            dot = (g * originals[j]).sum().item()
            length = (originals[j] ** 2).sum().item()
            if dot < 0 and length > 0:
                g = g - dot / length * originals[j]
        projected.append(g)
    total = sum(projected[1:], projected[0])
    return total / len(projected) if mean else total


def adamw(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    lr: float,
    step: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    correct_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step at the dtype of the tensors given; new p, m and v."""
    beta1, beta2 = betas
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step) if correct_bias else lr
    p = p - size * m / (v.sqrt() + eps)
    return p - lr * weight_decay * p, m, v


def random_rows(tasks: int, columns: int, dtype: torch.dtype = torch.float32, spare: int = 0, seed: int = 0) -> Tensor:
    """Random rows [T, P], `spare` elements further apart than they need to be."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, columns + spare, generator=generator).to(dtype)[:, :columns]
