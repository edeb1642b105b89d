# SPDX-License-Identifier: Apache-2.0
"""Losses as plain functions of fp32 tensors: static shapes, no synchronisation with the device, means over the batch.

Shapes: n examples, D width of a vector, C classes. `t` [n] is a label from 0 (different) to 1 (same meaning);
`y = 2 t - 1` is the same label from -1 to 1. `s` [n] is a score, usually a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.ops.cosine import cosine, normalize

SPREAD = 3.0  # of the initial thresholds, against equally likely classes at a score of 0


def symmetric_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Mean of (KL(p | q) + KL(q | p)) / 2 over rows of unnormalised log-probabilities [n, C]."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean() / 2


def hinge(s: Tensor, y: Tensor) -> Tensor:
    """Mean of max(0, 1 - y s)."""
    return F.relu(1 - y * s).mean()


def cosine_embedding(u: Tensor, v: Tensor, t: Tensor, margin: float) -> Tensor:
    """Mean of t (1 - cos) + (1 - t) max(0, cos - margin): for t = 0 or 1, PyTorch's CosineEmbeddingLoss."""
    c = cosine(u, v)
    return (t * (1 - c) + (1 - t) * F.relu(c - margin)).mean()


def cosent(u: Tensor, v: Tensor, t: Tensor, temperature: float) -> Tensor:
    """CoSENT (Su 2022): log(1 + sum over pairs of examples with t_i > t_j of exp((cos_j - cos_i) / temperature)).

    Only the order of the cosines matters, which is what a rank correlation measures.
    """
    c = cosine(u, v) / temperature
    differences = c[None, :] - c[:, None]  # [i, j] = c_j - c_i
    ordered = t[:, None] > t[None, :]
    exponents = differences.masked_fill(~ordered, -math.inf).flatten()
    return torch.cat([exponents, exponents.new_zeros(1)]).logsumexp(0)


def ordinal(s: Tensor, thresholds: Tensor, labels: Tensor) -> Tensor:
    """The CORAL loss of each example (Cao, Mirjalili & Raschka 2020, "Rank consistent ordinal regression"), [n].

    With C ordered classes there are C - 1 thresholds [C - 1], and P(label > k) = sigmoid(s - thresholds[k]), s [n]. The loss
    is the sum over k of the binary cross-entropies of label > k. Labels [n] from 0 to C - 1 need not be whole: 2.3 is
    above 2 with probability 0.3.
    """
    above = labels.to(s.dtype)[:, None] - torch.arange(len(thresholds), device=s.device, dtype=s.dtype)
    logits = s[:, None] - thresholds.sort().values
    return F.binary_cross_entropy_with_logits(logits, above.clamp(0, 1), reduction="none").sum(-1)


def ordinal_mean(s: Tensor, thresholds: Tensor) -> Tensor:
    """The expected label of the model of `ordinal`, 0 to C - 1, [n]: the sum over k of P(label > k)."""
    return (s[:, None] - thresholds).sigmoid().sum(-1)


def ordinal_levels(s: Tensor, thresholds: Tensor) -> Tensor:
    """The median label of the model of `ordinal`, int64 [n]: the number of k with P(label > k) > 1/2."""
    return (s[:, None] > thresholds).sum(-1)


def ordinal_probabilities(s: Tensor, thresholds: Tensor) -> Tensor:
    """P(label = k) of the model of `ordinal`, [n, C]."""
    above = (s[:, None] - thresholds.sort().values).sigmoid()  # [n, C - 1], descending
    one, zero = torch.ones_like(above[:, :1]), torch.zeros_like(above[:, :1])
    return torch.cat([one, above], dim=-1) - torch.cat([above, zero], dim=-1)


def initial_thresholds(classes: int) -> nn.Parameter:
    """Thresholds [C - 1], far enough apart that for some score each of a few classes is likely.

    Adam moves a threshold by at most the learning rate in a step, and a score much further, because all its weights move.
    With narrow thresholds, such as those that make all classes equally likely at a score of 0, the middle of 5 classes would
    hardly ever get more than 0.2.
    """
    above = torch.arange(classes - 1, 0, -1) / classes
    return nn.Parameter(-SPREAD * above.logit())


def ranking(u: Tensor, v: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017): each u_i must select its v_i among all v of the batch.

    Cross-entropy of softmax(cos(u_i, v_j) / temperature) at j = i, averaged with weights t_i: only matching pairs count,
    and the v of the other pairs serve as negatives. If all weights are 0, the loss is 0.
    """
    logits = normalize(u) @ normalize(v).T / temperature  # [n, n]
    each = logits.logsumexp(1) - logits.diagonal()
    total = t.sum()
    return (each * t).sum() / torch.where(total > 0, total, 1.0)


def contrastive(
    anchor: Tensor, positive: Tensor, negatives: Sequence[Tensor], temperature: float, symmetric: bool = False
) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017, section 4.4), with hard negatives if there are any.

    Mean of -log of exp(cos(a_i, p_i) / temperature) over the sum of exp(cos(a_i, c) / temperature), c over all positives and
    negatives of the batch; each argument is [n, D]. A temperature of 1 means none. With one negative per example it is
    eq. 5 of SimCSE (Gao et al. 2021), with none and p a second encoding of a its eq. 1. `symmetric` adds the loss of each
    p_i against all a, and halves the sum.
    """
    anchors, positives = normalize(anchor), normalize(positive)
    candidates = torch.cat([positives, *map(normalize, negatives)])  # [(1 + number of negatives) n, D]
    logits = anchors @ candidates.T / temperature
    own = logits[:, : anchor.shape[0]]
    loss = (logits.logsumexp(1) - own.diagonal()).mean()
    return (loss + (own.logsumexp(0) - own.diagonal()).mean()) / 2 if symmetric else loss


def triplet(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    distance: Literal["euclidean", "cosine"] = "euclidean",
) -> Tensor:
    """Mean of max(0, d(a, p) - d(a, n) + margin), with d the Euclidean distance or 1 - cosine.

    Reimers & Gurevych 2019, section 3, use the Euclidean distance and margin 1.
    """
    near, far = (_distance(anchor, x, distance) for x in (positive, negative))
    return F.relu(near - far + margin).mean()


def _distance(u: Tensor, v: Tensor, distance: Literal["euclidean", "cosine"]) -> Tensor:
    return 1 - cosine(u, v) if distance == "cosine" else torch.linalg.vector_norm(u - v, dim=-1)


def entailment_regression(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Squared error of cosines: target 1 for the entailed sentence, 0 for the contradiction, 0.5 for a neutral sentence.

    The triplet file has no neutral hypotheses; the entailed sentence of the batch's next example replaces them. The three
    parts have equal weight.
    """
    parts = (
        F.mse_loss(cosine(anchor, positive), torch.ones_like(anchor[:, 0])),
        F.mse_loss(cosine(anchor, negative), torch.zeros_like(anchor[:, 0])),
        F.mse_loss(cosine(anchor, positive.roll(1, 0)), torch.full_like(anchor[:, 0], 0.5)),
    )
    return torch.stack(parts).mean()
