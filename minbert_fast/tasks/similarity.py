# SPDX-License-Identifier: Apache-2.0
"""How alike do two sentences mean? Labels from 0 to 5, judged by Pearson's correlation (STS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import metrics
from minbert_fast.tasks.base import HeadOutput, register, require
from minbert_fast.tasks.pair import PairHead, PairLoss, PairOptions, PairTask

TOP = 5  # highest label


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
        require(self.data == "similarity", f'data = "{self.data}": expected "similarity"')
        require(not self.balanced, "balanced: similarity has no classes to balance")


class SimilarityHead(PairHead):
    """The head's degree of likeness on the labels' scale."""

    options: SimilarityOptions

    def predict(self, output: HeadOutput) -> Tensor:
        similarity = self.degree(output) * TOP
        return similarity.round() if self.options.rounded else similarity


@register("similarity")
@dataclass(frozen=True)
class SimilarityTask(PairTask):
    options: SimilarityOptions

    Options: ClassVar[type] = SimilarityOptions
    stem: ClassVar[str] = "sts"
    header: ClassVar[str] = "Predicted_Similiary"  # sic: part of the format

    @property
    def primary(self) -> str:
        return f"{self.name}_pearson"

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> SimilarityHead:
        return SimilarityHead(self.options, config.hidden_size, TOP + 1, shared)

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        assert labels is not None
        return {
            self.primary: metrics.pearson(predictions, labels),
            f"{self.name}_spearman": metrics.spearman(predictions, labels),
        }
