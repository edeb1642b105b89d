# SPDX-License-Identifier: Apache-2.0
"""Consistency regularisation: a penalty if a head's outputs for two copies of an example differ.

A batch may hold each example of a task twice: first all examples, then all of them again. The copies differ in their
dropout masks (R-Drop), or one of them is perturbed (SMART).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from minbert_fast.tasks.base import Head, HeadOutput
from minbert_fast.tasks.losses import symmetric_divergence


@dataclass(frozen=True)
class ConsistencyLoss:
    """The loss of duplicated examples: the task's own loss, plus `weight` times the divergence of the two outputs."""

    weight: float = 0.0
    both: bool = True  # the task's loss is the mean over both copies; False: that of the first copy

    def loss(self, head: Head, output: HeadOutput, labels: Tensor | None) -> Tensor:
        """A scalar, from the outputs for 2n examples. The task's loss sees each half as one batch."""
        first, second = split_copies(output)
        labels = None if labels is None else labels[: first.scores.shape[0]]
        total = head.loss(first, labels)
        if self.both:
            total = (total + head.loss(second, labels)) / 2
        return total + self.weight * divergence(head, first, second) if self.weight else total


def split_copies(output: HeadOutput) -> tuple[HeadOutput, HeadOutput]:
    """The outputs for the first copies and for the second copies."""
    n = output.scores.shape[0] // 2
    first = HeadOutput(output.scores[:n], tuple(x[:n] for x in output.vectors))
    return first, HeadOutput(output.scores[n:], tuple(x[n:] for x in output.vectors))


def divergence(head: Head, first: HeadOutput, second: HeadOutput) -> Tensor:
    """The mean divergence of two outputs for the same n examples: symmetric, 0 if they are equal.

    With class logits it is (KL(p | q) + KL(q | p)) / 2 of the class probabilities, else the squared difference of scores.
    """
    p, q = head.logits(first), head.logits(second)
    if p is None or q is None:
        return F.mse_loss(first.scores, second.scores)
    return symmetric_divergence(p, q)
