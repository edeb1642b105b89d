# SPDX-License-Identifier: Apache-2.0
"""Several classes per text: a probability of each of C classes, independent of the others (binary cross-entropy)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError, check
from minbert_fast.data.label_summary import LabelSummary
from minbert_fast.data.labels import ClassSets, Rule, split_names
from minbert_fast.model.config import BertConfig
from minbert_fast.ops.cross_entropy import binary_cross_entropy
from minbert_fast.tasks.base import HeadOutput, register
from minbert_fast.tasks.kinds.classes import ClassHead, ClassOptions, ClassTask
from minbert_fast.tasks.kinds.single import SingleHead, SingleOptions


@dataclass(frozen=True)
class MultilabelOptions(ClassOptions, SingleOptions):
    """Options of `multilabel`. `class_weights` are factors on the loss of the texts that have a class."""

    separator: str = ","  # between the names in a label that is text
    threshold: float = 0.5  # a text has a class from this probability on
    row_count: int = 0  # training rows, for "balanced"; 0: those of the training set

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.separator), 'separator = "": expected a character')
        check(0 <= self.threshold <= 1, f"threshold = {self.threshold}: expected a probability")
        check(not self.draw.by_class, "balanced, per_class: an example has several classes")
        check(self.written == "names", 'written: expected "names"')

    def unused(self) -> dict[str, str]:
        idle = {} if self.class_weights == "balanced" else {"row_count": 'class_weights = "balanced"'}
        return super().unused() | idle

    @property
    def weights(self) -> tuple[float, ...]:
        """Factors on the positive part of the loss, [C]. `balanced`: rows without a class for each row with it."""
        if not isinstance(self.class_weights, str):
            return self.class_weights
        return tuple((self.row_count - count) / count if count else 0.0 for count in self.class_counts)


class MultilabelHead(ClassHead, SingleHead):
    """A score of every class, [n, C]; labels and predictions are [n, C] of 0 and 1."""

    options: MultilabelOptions

    def __init__(self, options: MultilabelOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__(options, config, shared, len(options.classes))
        self.configure(options)

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        smoothing = self.options.label_smoothing
        t = labels * (1 - smoothing) + smoothing / 2 if smoothing else labels
        if self.class_weights is None:
            return binary_cross_entropy(output.scores, t)
        return F.binary_cross_entropy_with_logits(output.scores, t, pos_weight=self.class_weights)

    def predict(self, output: HeadOutput) -> Tensor:
        return (output.scores.sigmoid() >= self.options.threshold).float()

    def probabilities(self, output: HeadOutput) -> Tensor:
        return output.scores.sigmoid()


@register("multilabel")
class MultilabelTask(ClassTask):
    """`kind = "multilabel"`."""

    Options: ClassVar[type] = MultilabelOptions
    head_class: ClassVar[type] = MultilabelHead
    metric: ClassVar[str] = "micro_f1"
    reported: ClassVar[tuple[str, ...]] = ("accuracy", "micro_f1", "macro_f1", "average_precision")

    @property
    def resolved(self) -> bool:
        options = self.options
        return super().resolved and (options.class_weights != "balanced" or options.row_count > 0)

    @property
    def rule(self) -> Rule | None:
        return ClassSets(self.options.classes, self.options.separator)

    def resolve(self, summary: LabelSummary) -> dict[str, Any]:
        counts, separator = Counter(summary.listed), self.options.separator
        for label, rows in summary.counts.items():
            counts.update(dict.fromkeys(split_names(label, separator), rows))
        found = super().resolve(LabelSummary(summary.rows, counts, classes=summary.classes))
        unclear = next((name for name in found.get("classes", ()) if separator in name), None)
        if unclear is not None:  # prediction files join the names
            where = f"tasks.{self.name}: the class {unclear!r} contains the separator {separator!r}"
            raise ConfigError(f'{where}; set another one, such as separator = "|"')
        if self.options.class_weights == "balanced" and not self.options.row_count:
            found["row_count"] = summary.rows + summary.empty
        return found

    def as_labels(self, predictions: np.ndarray) -> list[Any]:
        names, separator = self.options.classes, self.options.separator
        return [separator.join(name for name, one in zip(names, row, strict=True) if one) for row in predictions]
