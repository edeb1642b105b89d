# SPDX-License-Identifier: Apache-2.0
"""A memory of labelled training sentences: how alike a new sentence is to each of them, and what they were labelled."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from minbert_fast.tasks.base import unit


class LabelledSentences(nn.Module):
    """`per_class` sentences of each of C classes, embedded once: [n, H] -> [n, 2 A] with A = C * per_class.

    The first A features are the cosines with the remembered sentences, the others their labels, the same for every
    example. Until `remember` is called, all of them are 0. Vectors and labels are buffers: a saved model keeps them.
    """

    vectors: Tensor  # [A, H], each of length 1
    labels: Tensor  # [A]

    def __init__(self, width: int, classes: int, per_class: int) -> None:
        super().__init__()
        self.classes = classes
        self.per_class = per_class
        self.register_buffer("vectors", torch.zeros(classes * per_class, width))
        self.register_buffer("labels", torch.zeros(classes * per_class))

    def forward(self, x: Tensor) -> Tensor:
        cosines = unit(x) @ self.vectors.T
        return torch.cat([cosines, self.labels.expand(x.shape[0], -1)], dim=-1)

    @torch.no_grad()
    def remember(self, vectors: Tensor, labels: Tensor) -> None:
        """Takes over embeddings [A, H] and labels [A]."""
        self.vectors.copy_(unit(vectors.to(self.vectors)))
        self.labels.copy_(labels)

    def choose(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Rows [A] of a training set with `labels`: the same number of each class, drawn by `seed`.

        A class with too few sentences gives some of them several times. Raises ValueError for one without any.
        """
        bits = np.random.Philox(key=seed)
        chosen = []
        for label in range(self.classes):
            members = np.flatnonzero(labels == label)
            if not len(members):
                raise ValueError(f"no training sentence of class {label} to compare with")
            order = np.argsort(bits.random_raw(len(members)), kind="stable")
            chosen.append(np.resize(members[order], self.per_class))
        return np.concatenate(chosen)
