# SPDX-License-Identifier: Apache-2.0
"""What two answers of a head to the same examples have in common, and losses that ask them to agree.

A batch may hold each example twice (its *twins*: first all of them once, then all again); the copies differ in dropout, or
in a perturbation of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minbert_fast.tasks import losses
from minbert_fast.tasks.base import Head, HeadOutput


@dataclass(frozen=True)
class Agreement:
    """The loss of an example with a twin: what the labels ask, and `weight` times the divergence of the two answers."""

    weight: float = 0.0
    both: bool = True  # the labels' loss is the mean of both copies'; False: that of the first alone

    def loss(self, head: Head, output: HeadOutput, labels: Tensor | None) -> Tensor:
        """Scalar, from the answers to 2n examples. Each copy is a batch of its own to losses that compare examples."""
        first, second = halves(output)
        labels = None if labels is None else labels[: first.scores.shape[0]]
        total = head.loss(first, labels)
        if self.both:
            total = (total + head.loss(second, labels)) / 2
        return total + self.weight * divergence(head, first, second) if self.weight else total


def halves(output: HeadOutput) -> tuple[HeadOutput, HeadOutput]:
    """The answers to the first and to the second copies."""
    n = output.scores.shape[0] // 2
    first = HeadOutput(output.scores[:n], tuple(x[:n] for x in output.vectors))
    return first, HeadOutput(output.scores[n:], tuple(x[n:] for x in output.vectors))


def divergence(head: Head, first: HeadOutput, second: HeadOutput) -> Tensor:
    """How far two answers to the same n examples are apart, a mean over them; symmetric, 0 where they are the same.

    For classes (KL(p | q) + KL(q | p)) / 2 of their probabilities, else the squared difference of the scores.
    """
    p, q = head.logits(first), head.logits(second)
    if p is None or q is None:
        return losses.squared(first.scores, second.scores)
    return losses.symmetric_divergence(p, q)
