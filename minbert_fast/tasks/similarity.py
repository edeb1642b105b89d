# SPDX-License-Identifier: Apache-2.0
"""Semantic textual similarity: how similar are two sentences? Labels from 0 to 5, Pearson correlation (STS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from minbert_fast.common.schema import check
from minbert_fast.tasks import metrics
from minbert_fast.tasks.base import HeadOutput, register
from minbert_fast.tasks.pair import PairHead, PairLoss, PairOptions, PairTask


@dataclass(frozen=True)
class SimilarityOptions(PairOptions):
    """The baseline: the embeddings' cosine, squared error on labels scaled to [0, 1]."""

    data: str = "similarity"
    head: Literal["linear", "cosine"] = "cosine"
    loss: PairLoss = "mse"
    dropout_at: tuple[Literal["embedding", "features"], ...] = ()
    rounded: bool = False  # predict whole labels (a published negative result)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.data == "similarity", f'data = "{self.data}": expected "similarity"')


class SimilarityHead(PairHead):
    """The pair's similarity on the labels' scale, 0 to 5."""

    options: SimilarityOptions
    levels = 6

    def predict(self, output: HeadOutput) -> Tensor:
        label = self.similarity(output) * (self.levels - 1)
        return label.round() if self.options.rounded else label


@register("similarity")
class SimilarityTask(PairTask):
    Options: ClassVar[type] = SimilarityOptions
    head_class: ClassVar[type] = SimilarityHead
    stem: ClassVar[str] = "sts"
    header: ClassVar[str] = "Predicted_Similiary"  # sic: part of the format
    metric: ClassVar[str] = "pearson"

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        assert labels is not None
        return {
            self.primary: metrics.pearson(predictions, labels),
            f"{self.name}_spearman": metrics.spearman(predictions, labels),
        }
