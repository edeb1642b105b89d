# SPDX-License-Identifier: Apache-2.0
"""What does a sentence feel like? Five classes (SST) or two (`data = "polarity"`, CFIMDB)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import metrics
from minbert_fast.tasks.base import (
    Head,
    HeadOutput,
    Stack,
    Task,
    TaskInput,
    TaskOptions,
    check_dropout,
    register,
    require,
    shared_stack,
)
from minbert_fast.tasks.layers import TokenLayers
from minbert_fast.tasks.neighbours import LabelledSentences

CLASSES = {
    "sentiment": ("negative", "somewhat negative", "neutral", "somewhat positive", "positive"),
    "polarity": ("negative", "positive"),
}


@dataclass(frozen=True)
class SentimentOptions(TaskOptions):
    """The baseline: dropout, linear on the sentence embedding, cross-entropy."""

    data: Literal["sentiment", "polarity"] = "sentiment"
    shared_layers: str = ""  # name of a stack of linear, ReLU, dropout that every task naming it shares
    shared_depth: int = 2
    extra_layers: int = 0  # BERT layers of the task's own, between the encoder and its pooling
    neighbours: int = 0  # labelled training sentences of each class to compare with, in place of the embedding itself
    nearest: int = 0  # of these, how many vote on a sentence; the votes go beside its embedding. 0: all are features
    temperature: float = 0.05  # of the votes: the lower, the more the very nearest decide
    dropout: float = 0.1
    label_smoothing: float = 0.0  # share of each target spread evenly over all classes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self.dropout)
        require(self.shared_depth >= 1, f"shared_depth = {self.shared_depth}: expected at least 1")
        require(0 <= self.extra_layers <= 48, f"extra_layers = {self.extra_layers}: expected 0 to 48")
        require(
            not (self.extra_layers and self.pooling == "pooler"),
            'pooling = "pooler" belongs to the encoder: with extra_layers expected mean, cls or max',
        )
        require(0 <= self.neighbours <= 100_000, f"neighbours = {self.neighbours}: expected 0 or more")
        require(
            not (self.neighbours and (self.extra_layers or self.shared_layers)),
            "neighbours: compared by the encoder's own embeddings, without extra_layers or shared_layers",
        )
        most = max(1, self.neighbours * len(CLASSES[self.data]))
        require(0 <= self.nearest < most, f"nearest = {self.nearest}: expected fewer than there are neighbours in all")
        require(self.temperature > 0, f"temperature = {self.temperature}: expected above 0")
        require(0 <= self.label_smoothing < 1, f"label_smoothing = {self.label_smoothing}: expected 0 <= share < 1")


class SentimentHead(Head):
    """Class scores [n, C] of single sentences."""

    options: SentimentOptions

    def __init__(self, options: SentimentOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__()
        self.options = options
        width = config.hidden_size
        self.layers = TokenLayers(config, options.extra_layers) if options.extra_layers else None
        self.stack: Stack | None = None
        if options.shared_layers:
            self.stack = shared_stack(options.shared_layers, width, options.shared_depth, options.dropout, shared)
        classes = len(CLASSES[options.data])
        self.neighbours: LabelledSentences | None = None
        if options.neighbours:
            settings = (options.neighbours, options.nearest, options.temperature)
            self.neighbours = LabelledSentences(width, classes, *settings)
            width = self.neighbours.features + (width if options.nearest else 0)
        self.output = nn.Linear(width, classes)

    def forward(self, inputs: TaskInput) -> HeadOutput:
        if self.layers is None:
            (x,) = inputs.embeddings
        else:
            x = self.layers(inputs, self.options.pooling or "mean")
        if self.neighbours is not None:
            found = self.neighbours(x)
            x = torch.cat([x, found], dim=-1) if self.options.nearest else found
        x = F.dropout(x, self.options.dropout, self.training)
        if self.stack is not None:
            x = self.stack(x)
        return HeadOutput(self.output(x))

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return F.cross_entropy(output.scores, labels.long(), label_smoothing=self.options.label_smoothing)

    def predict(self, output: HeadOutput) -> Tensor:
        return output.scores.argmax(-1)

    def logits(self, output: HeadOutput) -> Tensor:
        return output.scores

    def memory(self) -> LabelledSentences | None:
        return self.neighbours

    def probabilities(self, output: HeadOutput) -> Tensor:
        return output.scores.softmax(-1)


@register("sentiment")
@dataclass(frozen=True)
class SentimentTask(Task):
    options: SentimentOptions

    Options: ClassVar[type] = SentimentOptions
    stem: ClassVar[str] = "sst"
    header: ClassVar[str] = "Predicted_Sentiment"

    @property
    def dataset(self) -> str:
        return self.options.data

    @property
    def arity(self) -> int:
        return 1

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASSES[self.options.data]

    @property
    def primary(self) -> str:
        return f"{self.name}_accuracy"

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> SentimentHead:
        return SentimentHead(self.options, config, shared)

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        assert labels is not None
        return {
            self.primary: metrics.accuracy(predictions, labels),
            f"{self.name}_macro_f1": metrics.macro_f1(predictions, labels),
        }
