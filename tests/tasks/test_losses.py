# SPDX-License-Identifier: Apache-2.0
"""Losses against their formulas, those that tests/recipes/test_formulas.py lacks; gradients at zero vectors are finite."""

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


LABELS = torch.tensor([1.0, 0.0, 0.6, 0.6, 0.2], dtype=torch.float64)


def test_hinge():
    s = torch.tensor([2.0, -1.0, 0.3, -0.5, 0.0], dtype=torch.float64)
    y = 2 * LABELS - 1
    expected = sum(max(0.0, 1 - a * b) for a, b in zip(s.tolist(), y.tolist(), strict=True)) / N
    assert float(losses.hinge(s, y)) == pytest.approx(expected)


def test_cosine_embedding_equals_pytorchs_for_labels_0_and_1():
    """And goes over from one to the other in a straight line."""
    u, v = vectors(2)
    t = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    expected = F.cosine_embedding_loss(u, v, 2 * t - 1, margin=0.2)
    torch.testing.assert_close(losses.cosine_embedding(u, v, t, 0.2), expected)
    same, different = (F.cosine_embedding_loss(u, v, y, 0.2, reduction="none") for y in (t**0, -(t**0)))
    expected = (LABELS * same + (1 - LABELS) * different).mean()
    torch.testing.assert_close(losses.cosine_embedding(u, v, LABELS, 0.2), expected)


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


def test_cosine_triplet_equals_pytorchs():
    a, p, n = vectors(3)
    expected = F.triplet_margin_with_distance_loss(
        a, p, n, distance_function=lambda x, y: 1 - torch.cosine_similarity(x, y), margin=0.3
    )
    torch.testing.assert_close(losses.triplet(a, p, n, 0.3, "cosine"), expected)


@pytest.mark.parametrize("negatives", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_contrastive_is_a_cross_entropy_over_all_candidates(negatives, symmetric, temperature):
    texts = [x.requires_grad_() for x in vectors(2 + negatives)]
    a, p, *others = texts
    similarities = torch.stack([torch.stack([cosines(x, y) for y in torch.cat([p, *others])]) for x in a]) / temperature
    expected = F.cross_entropy(similarities, torch.arange(N))
    if symmetric:
        expected = (expected + F.cross_entropy(similarities[:, :N].T, torch.arange(N))) / 2
    loss = losses.contrastive(a, p, others, temperature, symmetric)
    torch.testing.assert_close(loss, expected)
    for own, other in zip(torch.autograd.grad(loss, texts), torch.autograd.grad(expected, texts), strict=True):
        torch.testing.assert_close(own, other)


def cosines(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum() / (u.square().sum() * v.square().sum()).sqrt()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_contrastive_equals_sentence_transformers():
    from sentence_transformers import losses as published

    class Encoder(torch.nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"sentence_embedding": features["vectors"]}

    for count in (2, 3, 4):
        texts = vectors(count)
        expected = published.MultipleNegativesRankingLoss(Encoder(), scale=20.0)([{"vectors": x} for x in texts], None)
        torch.testing.assert_close(losses.contrastive(texts[0], texts[1], texts[2:], 0.05), expected)


def test_ordinal():
    generator = torch.Generator().manual_seed(2)
    s = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    thresholds = torch.tensor([0.4, -0.8, 1.5], dtype=torch.float64).requires_grad_()  # in any order
    labels = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.25, 2.5], dtype=torch.float64)
    low, middle, high = sorted(thresholds.tolist())
    for i, each in enumerate(losses.ordinal(s, thresholds, labels).tolist()):
        total = 0.0
        for k, threshold in enumerate((low, middle, high)):
            p, t = 1 / (1 + math.exp(threshold - s[i].item())), min(1.0, max(0.0, labels[i].item() - k))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
        assert each == pytest.approx(total)
    torch.autograd.gradcheck(lambda a, b: losses.ordinal(a, b, labels), (s, thresholds))
    shares = losses.ordinal_probabilities(s, thresholds)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(losses.ordinal_mean(s, thresholds), shares @ torch.arange(4.0, dtype=torch.float64))
    medians = (shares.cumsum(-1) < 0.5).sum(-1)
    assert losses.ordinal_levels(s, thresholds).tolist() == medians.tolist()


@pytest.mark.parametrize(
    "loss",
    [
        lambda u, v, w: losses.cosine_embedding(u, v, LABELS, 0.0),
        lambda u, v, w: losses.cosent(u, v, LABELS, 0.05),
        lambda u, v, w: losses.ranking(u, v, LABELS, 0.05),
        lambda u, v, w: losses.contrastive(u, v, (w,), 0.05),
        lambda u, v, w: losses.contrastive(u, v, (w, u), 1.0, symmetric=True),
        lambda u, v, w: losses.triplet(u, v, w, 0.5, "cosine"),
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
