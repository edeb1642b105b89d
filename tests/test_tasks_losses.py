# SPDX-License-Identifier: Apache-2.0
"""Each loss against its formula, computed with loops over floats; gradients at zero vectors are finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minbert_fast.tasks import losses

N, D = 5, 4


def vectors(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(count)]


def cos(u: Tensor, v: Tensor) -> float:
    a, b = u.tolist(), v.tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def distance(u: Tensor, v: Tensor) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(u.tolist(), v.tolist(), strict=True)))


LABELS = torch.tensor([1.0, 0.0, 0.6, 0.6, 0.2], dtype=torch.float64)


def test_hinge():
    s = torch.tensor([2.0, -1.0, 0.3, -0.5, 0.0], dtype=torch.float64)
    y = 2 * LABELS - 1
    expected = sum(max(0.0, 1 - a * b) for a, b in zip(s.tolist(), y.tolist(), strict=True)) / N
    assert float(losses.hinge(s, y)) == pytest.approx(expected)


def test_cosine_embedding_equals_pytorchs_for_labels_0_and_1():
    u, v = vectors(2)
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    expected = F.cosine_embedding_loss(u, v, 2 * t - 1, margin=0.2)
    torch.testing.assert_close(losses.cosine_embedding(u, v, t, 0.2), expected)


def test_cosent():
    u, v = vectors(2)
    c = [cos(a, b) for a, b in zip(u, v, strict=True)]
    t = LABELS.tolist()
    total = sum(math.exp((c[j] - c[i]) / 0.5) for i in range(N) for j in range(N) if t[i] > t[j])
    assert float(losses.cosent(u, v, LABELS, 0.5)) == pytest.approx(math.log(1 + total))


def test_cosent_of_equal_labels_is_zero():
    u, v = (x.requires_grad_() for x in vectors(2))
    loss = losses.cosent(u, v, torch.ones(N, dtype=torch.float64), 0.05)
    loss.backward()
    assert loss.item() == 0.0
    assert u.grad is not None
    assert not u.grad.any()


def test_ranking():
    u, v = vectors(2)
    t = LABELS.tolist()
    total = 0.0
    for i in range(N):
        scores = [cos(u[i], v[j]) / 0.1 for j in range(N)]
        total += t[i] * (math.log(sum(map(math.exp, scores))) - scores[i])
    assert float(losses.ranking(u, v, LABELS, 0.1)) == pytest.approx(total / sum(t))


def test_ranking_without_positives_is_zero():
    u, v = (x.requires_grad_() for x in vectors(2))
    loss = losses.ranking(u, v, torch.zeros(N, dtype=torch.float64), 0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert u.grad is not None
    assert torch.isfinite(u.grad).all()


def test_contrastive_with_hard_negatives():
    a, p, n = vectors(3)
    total = 0.0
    for i in range(N):
        positive = math.exp(cos(a[i], p[i]) / 0.2)
        everything = sum(math.exp(cos(a[i], p[j]) / 0.2) + math.exp(cos(a[i], n[j]) / 0.2) for j in range(N))
        total -= math.log(positive / everything)
    assert float(losses.contrastive(a, p, n, 0.2)) == pytest.approx(total / N)


def test_triplet():
    a, p, n = vectors(3)
    expected = sum(max(0.0, distance(a[i], p[i]) - distance(a[i], n[i]) + 1.0) for i in range(N)) / N
    assert float(losses.triplet(a, p, n, 1.0)) == pytest.approx(expected)


def test_entailment_regression():
    a, p, n = vectors(3)
    total = 0.0
    for i in range(N):
        neutral = cos(a[i], p[i - 1])
        total += (cos(a[i], p[i]) - 1) ** 2 + cos(a[i], n[i]) ** 2 + (neutral - 0.5) ** 2
    assert float(losses.entailment_regression(a, p, n)) == pytest.approx(total / N / 3)


@pytest.mark.parametrize(
    "loss",
    [
        lambda u, v, w: losses.cosine_embedding(u, v, LABELS, 0.0),
        lambda u, v, w: losses.cosent(u, v, LABELS, 0.05),
        lambda u, v, w: losses.ranking(u, v, LABELS, 0.05),
        lambda u, v, w: losses.contrastive(u, v, w, 0.05),
        lambda u, v, w: losses.triplet(u, v, w, 1.0),
        lambda u, v, w: losses.entailment_regression(u, v, w),
    ],
)
def test_zero_vectors_and_equal_vectors_have_finite_gradients(loss):
    u, v, w = vectors(3)
    u[0] = 0
    v[1] = 0
    v[2] = u[2]
    leaves = [x.requires_grad_() for x in (u, v, w)]
    value = loss(*leaves)
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(x.grad).all() for x in leaves if x.grad is not None)
