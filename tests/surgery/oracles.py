# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery and AdamW again in fp64, the obvious way, apart from the package: the ground truth of the tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pcgrad(gradients: Tensor, orders: Sequence[Sequence[int]], mean: bool = False, own: bool = False) -> Tensor:
    """Algorithm 1 of arXiv:2001.06782 on whole fp64 vectors [T, P]; `orders[i]` is task i's order of all tasks.

    own: task i's projection passes over its own original gradient too, as the classic PyTorch loop does.
    """
    originals = [row.double() for row in gradients]
    projected = []
    for i, gradient in enumerate(originals):
        g = gradient.clone()
        for j in orders[i]:
            if j == i and not own:
                continue
            dot = (g * originals[j]).sum().item()
            length = (originals[j] ** 2).sum().item()
            if dot < 0 and length > 0:
                g = g - dot / length * originals[j]
        projected.append(g)
    total = sum(projected[1:], projected[0])
    return total / len(projected) if mean else total


def classic_pc_backward(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], orders: Sequence[Sequence[int]], mean: bool = True
) -> list[Tensor]:
    """The gradients of `parameters` that the classic optimizer wrapper leaves in `.grad`, in fp64.

    github.com/WeiChengTseng/Pytorch-PCGrad, commit e987ac6: a task that does not reach a parameter has zeros there; the
    projections run over all parameters; the result is averaged where every task reaches the parameter, summed elsewhere.
    """
    trained = [p for p in parameters if p.requires_grad]
    rows = []
    for loss in losses:
        found = iter(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True))
        rows.append([next(found) if p.requires_grad else None for p in parameters])
    filled = [[torch.zeros_like(p) if g is None else g for p, g in zip(parameters, row, strict=True)] for row in rows]
    total = pcgrad(torch.stack([torch.cat([g.flatten() for g in row]) for row in filled]), orders, own=True)
    results = []
    for number, piece in enumerate(total.split([p.numel() for p in parameters])):
        everywhere = all(row[number] is not None for row in rows)
        results.append((piece / len(losses) if mean and everywhere else piece).view_as(parameters[number]))
    return results


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
