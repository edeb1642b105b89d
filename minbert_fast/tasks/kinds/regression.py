# SPDX-License-Identifier: Apache-2.0
"""A number for a text: dropout, a linear layer on the embedding, squared error on labels scaled to [0, 1] by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.model.config import BertConfig
from minbert_fast.ops.cross_entropy import binary_cross_entropy
from minbert_fast.tasks import losses
from minbert_fast.tasks.base import HeadOutput, register
from minbert_fast.tasks.kinds.graded import NumberTask, RangeOptions, from_unit, to_unit
from minbert_fast.tasks.kinds.single import SingleHead, SingleOptions


@dataclass(frozen=True)
class RegressionOptions(RangeOptions, SingleOptions):
    """Options of `regression`."""

    loss: Literal["mse", "l1", "bce", "ordinal"] = "mse"  # ordinal: labels are graded, such as 1 to 5 stars
    labels: Literal["unit", "raw"] = "unit"  # targets of mse and l1: scaled to [0, 1], or as in the file

    def unused(self) -> dict[str, str]:
        return super().unused() | ({} if self.loss in ("mse", "l1") else {"labels": 'loss = "mse" and "l1"'})


class RegressionHead(SingleHead):
    """A score [n] per text: the target, its logit (bce), or what thresholds between whole labels divide (ordinal)."""

    options: RegressionOptions

    def __init__(self, options: RegressionOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__(options, config, shared, 1)
        self.thresholds = losses.initial_thresholds(options.levels) if options.loss == "ordinal" else None

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        s, options = output.scores, self.options
        labels = labels.to(s.dtype)
        if self.thresholds is not None:
            return losses.ordinal(s, self.thresholds, labels - options.limits[0]).mean()
        target = labels if options.labels == "raw" and options.loss != "bce" else to_unit(labels, options.limits)
        if options.loss == "bce":
            return binary_cross_entropy(s, target)
        return F.mse_loss(s, target) if options.loss == "mse" else F.l1_loss(s, target)

    def predict(self, output: HeadOutput) -> Tensor:
        s, options = output.scores, self.options
        if self.thresholds is not None:
            label = losses.ordinal_mean(s, self.thresholds) + options.limits[0]
        elif options.loss == "bce":
            label = from_unit(s.sigmoid(), options.limits)
        else:
            label = s if options.labels == "raw" else from_unit(s, options.limits)
        if options.range is not None:
            label = label.clamp(*options.range)
        return torch.round(label) if options.rounded else label


@register("regression")
class RegressionTask(NumberTask):
    """`kind = "regression"`."""

    Options: ClassVar[type] = RegressionOptions
    head_class: ClassVar[type] = RegressionHead
