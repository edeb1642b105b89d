# SPDX-License-Identifier: Apache-2.0
"""Losses as plain functions of fp32 tensors: static shapes, means over the batch, no synchronisation with the device.

Shapes: n examples, D width of a vector, C classes. `t` [n] is a label from 0 (different) to 1 (same meaning);
`y = 2 t - 1` is the same label from -1 to 1. `s` [n] is a score, usually a cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from minbert_fast.tasks.base import cosine, normalize


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


def ranking(u: Tensor, v: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Multiple negatives ranking (Henderson et al. 2017): each u_i must select its v_i among all v of the batch.

    Cross-entropy of softmax(cos(u_i, v_j) / temperature) at j = i, averaged with weights t_i: only matching pairs count,
    and the v of the other pairs serve as negatives. If all weights are 0, the loss is 0.
    """
    logits = normalize(u) @ normalize(v).T / temperature  # [n, n]
    each = logits.logsumexp(1) - logits.diagonal()
    total = t.sum()
    return (each * t).sum() / torch.where(total > 0, total, 1.0)


def contrastive(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """In-batch contrast with hard negatives (supervised SimCSE, Gao et al. 2021, eq. 5); each argument is [n, D].

    Mean of -log of exp(cos(a_i, p_i) / temperature) over the sum of exp(cos(a_i, c) / temperature), c over all p and n.
    """
    candidates = torch.cat([normalize(positive), normalize(negative)])  # [2n, D]
    logits = normalize(anchor) @ candidates.T / temperature
    return (logits.logsumexp(1) - logits[:, : anchor.shape[0]].diagonal()).mean()


def triplet(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Mean of max(0, |a - p| - |a - n| + margin), Euclidean (Reimers & Gurevych 2019, section 3)."""
    near = torch.linalg.vector_norm(anchor - positive, dim=-1)
    far = torch.linalg.vector_norm(anchor - negative, dim=-1)
    return F.relu(near - far + margin).mean()


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
