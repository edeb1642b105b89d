# SPDX-License-Identifier: Apache-2.0
"""A memory of labelled training sentences: how alike a new sentence is to each of them, and what they were labelled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from minbert_fast.tasks.base import unit


class LabelledSentences(nn.Module):
    """Up to `per_class` sentences of each of C classes, embedded once, A = C * per_class in all.

    With `nearest` = 0, every one is a feature: [n, H] -> [n, 2 A], the cosines with the remembered sentences, then their
    labels, the same for every example. Otherwise the `nearest` ones vote: [n, H] -> [n, C], with k among them

        vote for c = sum over k labelled c of exp(cos_k / temperature) / sum over k of exp(cos_k / temperature)

    In training the very nearest is passed over, for there a sentence finds itself. Until `remember` is called,
    features are the same for every sentence. Vectors and labels are buffers: a saved model keeps them.
    """

    vectors: Tensor  # [A, H], each of length 1; zeros where there was no sentence
    labels: Tensor  # [A]; -1 where there was none

    def __init__(self, width: int, classes: int, per_class: int, nearest: int = 0, temperature: float = 0.05) -> None:
        super().__init__()
        self.classes = classes
        self.per_class = per_class
        self.nearest = nearest
        self.temperature = temperature
        self.register_buffer("vectors", torch.zeros(classes * per_class, width))
        self.register_buffer("labels", torch.zeros(classes * per_class))

    @property
    def features(self) -> int:
        """What it makes of a sentence, numbers."""
        return self.classes if self.nearest else 2 * self.classes * self.per_class

    def forward(self, x: Tensor) -> Tensor:
        cosines = unit(x) @ self.vectors.T  # [n, A]
        if self.nearest:
            return self._votes(cosines)
        return torch.cat([cosines, self.labels.expand(x.shape[0], -1)], dim=-1)

    def _votes(self, cosines: Tensor) -> Tensor:
        itself = int(self.training)
        near, index = cosines.masked_fill(self.labels < 0, -torch.inf).topk(self.nearest + itself)  # [n, k]
        shares = (near[:, itself:] / self.temperature).softmax(-1)
        named = self.labels[index[:, itself:], None] == torch.arange(self.classes, device=index.device)  # [n, k, C]
        return (shares[:, :, None] * named).sum(1)

    @torch.no_grad()
    def remember(self, vectors: Tensor, labels: Tensor) -> None:
        """Takes over embeddings [R, H] and labels [R] of R <= A sentences, in place of all it had."""
        count = len(labels)
        self.vectors.zero_()
        self.labels.fill_(-1.0)
        self.vectors[:count] = unit(vectors.to(self.vectors))
        self.labels[:count] = labels.to(self.labels)

    def choose(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Rows [R] of a training set with `labels`: `per_class` of each class, drawn by `seed`.

        A class with too few sentences gives some of them several times where every one is a feature, and all it has
        where the nearest vote. Raises ValueError for a class without any.
        """
        bits = np.random.Philox(key=seed)
        chosen = []
        for label in range(self.classes):
            members = np.flatnonzero(labels == label)
            if not len(members):
                raise ValueError(f"no training sentence of class {label} to compare with")
            order = members[np.argsort(bits.random_raw(len(members)), kind="stable")]
            chosen.append(order[: self.per_class] if self.nearest else np.resize(order, self.per_class))
        return np.concatenate(chosen)
