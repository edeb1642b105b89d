# SPDX-License-Identifier: Apache-2.0
"""A number for two texts, such as how similar they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from minbert_fast.model.config import BertConfig
from minbert_fast.tasks.base import HeadOutput, register
from minbert_fast.tasks.kinds.graded import OVER_LEVELS, NumberTask, RangeOptions, from_unit
from minbert_fast.tasks.kinds.pair import PairHead, PairLoss, PairOptions, PairTask


@dataclass(frozen=True)
class PairRegressionOptions(RangeOptions, PairOptions):
    """Options of `pair-regression`."""

    loss: PairLoss = "mse"


class PairRegressionHead(PairHead):
    """The pair's similarity, predicted on the labels' scale."""

    options: PairRegressionOptions

    def __init__(self, options: PairRegressionOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__(options, config, shared, options.levels if options.loss in OVER_LEVELS else 0)

    @property
    def limits(self) -> tuple[float, float]:
        return self.options.limits

    def predict(self, output: HeadOutput) -> Tensor:
        free = self.options.head == "linear" and self.options.range is None  # a score without bounds, of such labels
        label = from_unit(self.similarity(output, bounded=not free), self.limits)
        return label.round() if self.options.rounded else label


@register("pair-regression")
class PairRegressionTask(NumberTask, PairTask):
    """`kind = "pair-regression"`."""

    Options: ClassVar[type] = PairRegressionOptions
    head_class: ClassVar[type] = PairRegressionHead
