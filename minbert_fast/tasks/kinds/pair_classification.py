# SPDX-License-Identifier: Apache-2.0
"""Classification of two texts: do they mean the same, does one follow from the other? One of C classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import check
from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import losses
from minbert_fast.tasks.base import HeadOutput, register
from minbert_fast.tasks.kinds.classes import ClassHead, ClassOptions, ClassTask, weighted_mean
from minbert_fast.tasks.kinds.pair import PairHead, PairLoss, PairOptions, PairTask


@dataclass(frozen=True)
class PairClassificationOptions(ClassOptions, PairOptions):
    """Options of `pair-classification`. Losses other than cross_entropy and ordinal are for two classes."""

    loss: PairLoss = "cross_entropy"
    threshold: float = 0.5  # of two classes: the second one from this probability on

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.threshold <= 1, f"threshold = {self.threshold}: expected a probability")
        count = f"the task has {len(self.classes)} classes"
        if len(self.classes) > 2:
            check(self.loss in ("cross_entropy", "ordinal"), f'loss = "{self.loss}": {count}; expected "cross_entropy"')
            check(self.threshold == 0.5, f"threshold: {count}, the most likely one is predicted")
            check(not self.auxiliary, f"auxiliary: {count}, not two")
        weighted = self.loss in ("cross_entropy", "bce", "ordinal")
        check(weighted or not self.class_weights, f'class_weights: loss = "{self.loss}" has none')
        smoothed = self.loss in ("cross_entropy", "bce")
        check(smoothed or not self.label_smoothing, f'label_smoothing: loss = "{self.loss}" has none')


class PairClassificationHead(ClassHead, PairHead):
    """Class scores [n, C], or one score [n] for two classes."""

    options: PairClassificationOptions

    def __init__(self, options: PairClassificationOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__(options, config, shared, len(options.classes))
        self.configure(options)

    @property
    def limits(self) -> tuple[float, float]:
        return 0, len(self.options.classes) - 1

    def main_loss(self, output: HeadOutput, t: Tensor) -> Tensor:
        options, weights = self.options, self.class_weights
        if weights is None and not options.label_smoothing:
            return super().main_loss(output, t)
        labels, smoothing = self.nearest_level(t), options.label_smoothing
        if options.loss == "ordinal":
            assert self.thresholds is not None
            each = losses.ordinal(output.scores, self.thresholds, labels)
        elif options.loss == "bce":
            target = t * (1 - smoothing) + smoothing / 2
            each = F.binary_cross_entropy_with_logits(output.scores, target, reduction="none")
        else:
            each = F.cross_entropy(output.scores, labels, label_smoothing=smoothing, reduction="none")
        return weighted_mean(each, labels, weights)

    def predict(self, output: HeadOutput) -> Tensor:
        if len(self.options.classes) == 2:
            return self.as_written((self.similarity(output) >= self.options.threshold).long())
        return super().predict(output)

    def probabilities(self, output: HeadOutput) -> Tensor:
        if len(self.options.classes) == 2:
            similarity = self.similarity(output)
            return torch.stack([1 - similarity, similarity], dim=-1)
        return super().probabilities(output)


@register("pair-classification")
class PairClassificationTask(ClassTask, PairTask):
    """`kind = "pair-classification"`."""

    Options: ClassVar[type] = PairClassificationOptions
    head_class: ClassVar[type] = PairClassificationHead
