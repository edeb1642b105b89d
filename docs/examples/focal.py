# SPDX-License-Identifier: Apache-2.0
"""A new head in one file: a hidden layer, and the focal loss (Lin et al. 2017, equation 4).

It suits classes of very different sizes, because examples that the model already classifies well have a small weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import HeadOutput, TaskInput, register
from minbert_fast.tasks.kinds.classes import weighted_mean
from minbert_fast.tasks.kinds.classification import ClassificationHead, ClassificationOptions, ClassificationTask


# 1. Its options under [tasks.NAME] in a recipe, in addition to those of `classification`.
@dataclass(frozen=True)
class FocalOptions(ClassificationOptions):
    gamma: float = 2.0  # 0: cross-entropy


# 2. From the embedding of a text [n, H] to scores [n, C], and the mean loss over n examples.
class FocalHead(ClassificationHead):
    options: FocalOptions

    def __init__(self, options: FocalOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__(options, config, shared)
        self.hidden = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, inputs: TaskInput) -> HeadOutput:
        (x,) = inputs.embeddings
        return super().forward(replace(inputs, embeddings=(F.gelu(self.hidden(x)),)))

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        each = F.cross_entropy(output.scores, labels, label_smoothing=self.options.label_smoothing, reduction="none")
        p = output.scores.softmax(-1).gather(1, labels[:, None]).squeeze(1)
        return weighted_mean((1 - p) ** self.options.gamma * each, labels, self.class_weights)


# 3. The kind: data, classes, metrics and prediction files are those of `classification`.
@register("focal")
class FocalTask(ClassificationTask):
    Options: ClassVar[type] = FocalOptions
    head_class: ClassVar[type] = FocalHead
