# SPDX-License-Identifier: Apache-2.0
"""Paraphrase detection: do two questions mean the same? Labels 0 and 1 (Quora)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minbert_fast.common.schema import check
from minbert_fast.tasks.base import HeadOutput, register
from minbert_fast.tasks.pair import PairHead, PairOptions, PairTask


@dataclass(frozen=True)
class ParaphraseOptions(PairOptions):
    """The baseline: dropout, both embeddings concatenated, linear, binary cross-entropy."""

    data: str = "paraphrase"
    threshold: float = 0.5  # a pair is a paraphrase from this probability on

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.data == "paraphrase", f'data = "{self.data}": expected "paraphrase"')
        check(0 <= self.threshold <= 1, f"threshold = {self.threshold}: expected a probability")


class ParaphraseHead(PairHead):
    """Reads the pair's similarity from 0 to 1 as a probability."""

    options: ParaphraseOptions
    levels = 2

    def predict(self, output: HeadOutput) -> Tensor:
        return (self.similarity(output) >= self.options.threshold).float()  # the course's files have 0.0 and 1.0

    def probabilities(self, output: HeadOutput) -> Tensor:
        similarity = self.similarity(output)
        return torch.stack([1 - similarity, similarity], dim=-1)


@register("paraphrase")
class ParaphraseTask(PairTask):
    Options: ClassVar[type] = ParaphraseOptions
    head_class: ClassVar[type] = ParaphraseHead
    stem: ClassVar[str] = "para"
    header: ClassVar[str] = "Predicted_Is_Paraphrase"

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("different", "paraphrase")
