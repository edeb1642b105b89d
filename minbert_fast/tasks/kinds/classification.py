# SPDX-License-Identifier: Apache-2.0
"""Classification of a text: one of C classes. Dropout, a linear layer on the embedding, cross-entropy by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import check
from minbert_fast.model.config import BertConfig
from minbert_fast.ops.cross_entropy import cross_entropy
from minbert_fast.tasks import losses
from minbert_fast.tasks.base import HeadOutput, register
from minbert_fast.tasks.kinds.classes import ClassHead, ClassOptions, ClassTask, weighted_mean
from minbert_fast.tasks.kinds.single import SingleHead, SingleOptions
from minbert_fast.tasks.neighbours import LabelledSentences


@dataclass(frozen=True)
class ClassificationOptions(ClassOptions, SingleOptions):
    """Options of `classification`."""

    loss: Literal["cross_entropy", "ordinal"] = "cross_entropy"  # ordinal: the classes are in order, such as stars
    neighbours: int = 0  # compare with this many labelled training sentences per class; 0: use the embedding itself
    nearest: int = 0  # number of nearest neighbours whose votes are added to the embedding; 0: all cosines are features
    temperature: float = 0.05  # of the votes; a lower temperature gives the nearest ones more weight

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.neighbours <= 100_000, f"neighbours = {self.neighbours}: expected 0 to 100000")
        check(
            not (self.neighbours and (self.extra_layers or self.shared_layers)),
            "neighbours: compares the encoder's own embeddings, so extra_layers and shared_layers must be unset",
        )
        total = max(1, self.neighbours * max(2, len(self.classes)))
        check(0 <= self.nearest < total, f"nearest = {self.nearest}: expected fewer than the {total} neighbours")
        check(self.temperature > 0, f"temperature = {self.temperature}: expected above 0")
        check(self.loss != "ordinal" or not self.label_smoothing, 'label_smoothing: loss = "ordinal" has none')

    def unused(self) -> dict[str, str]:
        return super().unused() | ({} if self.nearest else {"temperature": "nearest"})


class ClassificationHead(ClassHead, SingleHead):
    """Class scores [n, C]; for the ordinal loss one score [n], and thresholds between the classes."""

    options: ClassificationOptions

    def __init__(self, options: ClassificationOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        classes, stored = len(options.classes), None
        if options.neighbours:
            settings = (options.neighbours, options.nearest, options.temperature)
            stored = LabelledSentences(config.hidden_size, classes, *settings)
        super().__init__(options, config, shared, 1 if options.loss == "ordinal" else classes, stored)
        self.thresholds = losses.initial_thresholds(classes) if options.loss == "ordinal" else None
        self.configure(options)

    def configure(self, options: Any) -> None:
        super().configure(options)
        if self.neighbours is not None:
            self.neighbours.nearest, self.neighbours.temperature = options.nearest, options.temperature

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        labels, scores, smoothing = labels.long(), output.scores, self.options.label_smoothing
        if self.thresholds is not None:
            return weighted_mean(losses.ordinal(scores, self.thresholds, labels), labels, self.class_weights)
        if self.class_weights is None:
            return cross_entropy(scores, labels, smoothing)
        each = F.cross_entropy(scores, labels, label_smoothing=smoothing, reduction="none")
        return weighted_mean(each, labels, self.class_weights)

    def logits(self, output: HeadOutput) -> Tensor | None:
        return output.scores if self.thresholds is None else None


@register("classification")
class ClassificationTask(ClassTask):
    """`kind = "classification"`."""

    Options: ClassVar[type] = ClassificationOptions
    head_class: ClassVar[type] = ClassificationHead
