# SPDX-License-Identifier: Apache-2.0
"""Nearest-neighbour features: compares a sentence with labelled training sentences."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from minbert_fast.ops.cosine import normalize


class LabelledSentences(nn.Module):
    """Stored embeddings of up to `per_class` sentences of each of C classes, A = C * per_class in all.

    With `nearest` = 0, [n, H] -> [n, 2 A]: the cosines with the stored sentences, then the stored labels, which are the same
    for every example. With `nearest` > 0, [n, H] -> [n, C]: the votes of the `nearest` stored sentences,

        votes[c] = sum of exp(cos_k / temperature) over those with label c / the same sum over all of them

    Training ignores the nearest sentence, because it is the sentence itself. Before `store` is called, the output is the
    same for every sentence. Vectors and labels are buffers, so a saved model contains them.
    """

    vectors: Tensor  # [A, H], rows of length 1; unused rows are 0
    labels: Tensor  # [A]; unused entries are -1

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
        """Width of the output."""
        return self.classes if self.nearest else 2 * self.classes * self.per_class

    def forward(self, x: Tensor) -> Tensor:
        cosines = normalize(x) @ self.vectors.T  # [n, A]
        if not self.nearest:
            return torch.cat([cosines, self.labels.expand(x.shape[0], -1)], dim=-1)
        itself = int(self.training)
        near, index = cosines.masked_fill(self.labels < 0, -torch.inf).topk(self.nearest + itself)  # [n, k]
        shares = (near[:, itself:] / self.temperature).softmax(-1)
        one_hot = self.labels[index[:, itself:], None] == torch.arange(self.classes, device=index.device)  # [n, k, C]
        return (shares[:, :, None] * one_hot).sum(1)

    @torch.no_grad()
    def store(self, vectors: Tensor, labels: Tensor) -> None:
        """Replaces the stored sentences by R <= A others, given their embeddings [R, H] and labels [R]."""
        count = len(labels)
        self.vectors.zero_()
        self.labels.fill_(-1.0)
        self.vectors[:count] = normalize(vectors.to(self.vectors))
        self.labels[:count] = labels.to(self.labels)

    def choose(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Random rows [R] of a training set with `labels`: `per_class` of each class.

        If a class has fewer sentences, they are repeated (`nearest` = 0) or fewer are returned. Raises ValueError for a
        class without sentences.
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
