# SPDX-License-Identifier: Apache-2.0
"""Mean cross-entropies of a batch's scores. On a GPU one launch finds loss and gradient, which the backward scales.

PyTorch computes them elsewhere, and where there are too many scores for one program.

Shapes: n examples, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import Op, kernel_op

SCORES, CLASSES = 8192, 1024  # the most that the kernels take


def binary_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean of -t log p - (1 - t) log(1 - p), p the sigmoid of a score; scores and targets of one shape and dtype -> []."""
    if not _few(scores) or targets.shape != scores.shape:
        return F.binary_cross_entropy_with_logits(scores, targets)
    return _loss(scores, binary_cross_entropy_with_gradient, targets)


def cross_entropy(scores: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean of -log softmax at the labels, scores [n, C], labels [n] int64 from 0 to C - 1 -> [].

    `smoothing` is the share of a target that all classes get in equal parts (Szegedy et al. 2016, section 7).
    """
    if not _few(scores) or scores.shape[1] > CLASSES or labels.shape != scores.shape[:1]:
        return F.cross_entropy(scores, labels, label_smoothing=smoothing)
    return _loss(scores, cross_entropy_with_gradient, labels, smoothing)


def _few(scores: Tensor) -> bool:
    return implementation(scores) == "triton" and 0 < scores.numel() <= SCORES


def _loss(scores: Tensor, op: Op, *targets: Any) -> Tensor:
    loss: Tensor = _WithGradient.apply(scores, op, *targets)
    return loss


@kernel_op()
def binary_cross_entropy_with_gradient(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss [], and its gradient of the scores."""
    return scores.new_empty(()), torch.empty_like(scores)


@kernel_op()
def cross_entropy_with_gradient(scores: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """The loss [], and its gradient [n, C]."""
    return scores.new_empty(()), torch.empty_like(scores)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, op: Op, *targets: Any) -> Tensor:
        loss, gradient = op(scores, *targets)
        ctx.save_for_backward(gradient)
        ctx.targets = len(targets)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss, None, *(None,) * ctx.targets
