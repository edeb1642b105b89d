# SPDX-License-Identifier: Apache-2.0
"""Do two questions mean the same? Labels 0 and 1 (Quora)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import metrics
from minbert_fast.tasks.base import HeadOutput, register, require
from minbert_fast.tasks.pair import PairHead, PairOptions, PairTask


@dataclass(frozen=True)
class ParaphraseOptions(PairOptions):
    """The baseline: dropout, both embeddings side by side, linear, binary cross-entropy."""

    data: str = "paraphrase"
    threshold: float = 0.5  # probability from which a pair counts as a paraphrase

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.data == "paraphrase", f'data = "{self.data}": expected "paraphrase"')
        require(0 <= self.threshold <= 1, f"threshold = {self.threshold}: expected a probability")


class ParaphraseHead(PairHead):
    """The head's degree of likeness, read as a probability."""

    options: ParaphraseOptions

    def predict(self, output: HeadOutput) -> Tensor:
        return (self.degree(output) >= self.options.threshold).float()  # the course's files have 0.0 and 1.0

    def probabilities(self, output: HeadOutput) -> Tensor:
        degree = self.degree(output)
        return torch.stack([1 - degree, degree], dim=-1)


@register("paraphrase")
@dataclass(frozen=True)
class ParaphraseTask(PairTask):
    options: ParaphraseOptions

    Options: ClassVar[type] = ParaphraseOptions
    stem: ClassVar[str] = "para"
    header: ClassVar[str] = "Predicted_Is_Paraphrase"

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("different", "paraphrase")

    @property
    def primary(self) -> str:
        return f"{self.name}_accuracy"

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> ParaphraseHead:
        return ParaphraseHead(self.options, config.hidden_size, 2, shared)

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        assert labels is not None
        return {
            self.primary: metrics.accuracy(predictions, labels),
            f"{self.name}_macro_f1": metrics.macro_f1(predictions, labels),
        }
