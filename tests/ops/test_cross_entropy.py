# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies on every floor: losses and gradients against fp64, sure and unsure scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minbert_fast.ops.backend import force
from minbert_fast.ops.cross_entropy import (
    SCORES,
    binary_cross_entropy,
    binary_cross_entropy_with_gradient,
    cross_entropy,
    cross_entropy_with_gradient,
)
from tests import tolerance
from tests.ops.common import random

SCALES = (0.01, 1.0, 30.0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(1,), (32,), (33,), (1500,), (7, 6)])
def test_binary(shape: tuple[int, ...], scale: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = scale * random(*shape, dtype=torch.float32, device=device, generator=generator)
    targets = torch.rand(shape, generator=generator).to(device)
    targets = torch.where(targets < 0.3, 0.0, torch.where(targets > 0.7, 1.0, targets))

    def formula(scores: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, targets)

    check(formula, scores, binary_cross_entropy(scores.requires_grad_(), targets), targets=targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (32, 5), (5, 300), (700, 3), (3, 1024)])
def test_classes(rows: int, classes: int, scale: float, smoothing: float, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = scale * random(rows, classes, dtype=torch.float32, device=device, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)

    def formula(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=smoothing)

    check(formula, scores, cross_entropy(scores.requires_grad_(), labels, smoothing))


def check(formula: object, scores: Tensor, loss: Tensor, **constants: Tensor) -> None:
    """Holds a loss and its gradient to the error budget, with a factor on the loss."""
    factor = torch.tensor(-1.7, device=scores.device)
    (gradient,) = torch.autograd.grad(loss, scores, factor)
    expected = tolerance.reference(formula, {"scores": scores.detach()}, [factor], **constants)  # type: ignore[arg-type]
    expected.check([loss, gradient])


def test_sure_and_right_is_not_lost(device: torch.device) -> None:
    """log(1 + x) of a tiny x is x; as a logarithm of a rounded sum it is 0."""
    scores, targets = torch.tensor([20.0, -25.0], device=device), torch.tensor([1.0, 0.0], device=device)
    expected = F.binary_cross_entropy_with_logits(scores.double(), targets.double())
    torch.testing.assert_close(binary_cross_entropy(scores, targets).double(), expected, rtol=1e-2, atol=0.0)


def test_what_is_not_finite_is_not_lost(device: torch.device) -> None:
    scores = torch.tensor([[0.0, torch.nan], [1.0, 2.0]], device=device)
    assert cross_entropy(scores, torch.tensor([0, 1], device=device)).isnan()
    assert binary_cross_entropy(scores, torch.zeros_like(scores)).isnan()


def test_a_label_that_is_no_class_makes_the_loss_nan(triton: torch.device) -> None:
    for label in (-1, 2):
        labels = torch.tensor([0, label], device=triton)
        assert cross_entropy(torch.zeros(2, 2, device=triton), labels).isnan()


def test_too_many_scores_for_one_program(triton: torch.device) -> None:
    scores = torch.zeros(SCORES + 1, 1, device=triton)
    assert float(binary_cross_entropy(scores, scores)) == pytest.approx(0.6931472)
    assert float(cross_entropy(scores.T, torch.tensor([1], device=triton))) == pytest.approx(9.011035)


def test_opcheck() -> None:
    scores = torch.randn(6, 3)
    with force("triton"):
        labels = torch.tensor([0, 1, 2, 0, 1, 2])
        torch.library.opcheck(cross_entropy_with_gradient.overload, (scores, labels, 0.1))
        torch.library.opcheck(binary_cross_entropy_with_gradient.overload, (scores, torch.rand(6, 3)))
