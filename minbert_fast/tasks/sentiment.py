# SPDX-License-Identifier: Apache-2.0
"""Sentiment classification of a sentence: five classes (SST) or two (`data = "polarity"`, CFIMDB)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import check, check_at_least, check_below_one
from minbert_fast.model import fused
from minbert_fast.model.bert import BertLayer, read_layer
from minbert_fast.model.config import BertConfig
from minbert_fast.model.passes import AutogradPass, Sentences, through
from minbert_fast.ops.pooling import Mode, pool
from minbert_fast.tasks.base import Head, HeadOutput, Task, TaskInput, TaskOptions, register, shared_stack
from minbert_fast.tasks.neighbours import LabelledSentences

CLASSES = {
    "sentiment": ("negative", "somewhat negative", "neutral", "somewhat positive", "positive"),
    "polarity": ("negative", "positive"),
}


@dataclass(frozen=True)
class SentimentOptions(TaskOptions):
    """The baseline: dropout, linear on the sentence embedding, cross-entropy."""

    data: Literal["sentiment", "polarity"] = "sentiment"
    shared_layers: str = ""  # name of a stack of linear, ReLU, dropout; tasks with the same name share it
    shared_depth: int = 2
    extra_layers: int = 0  # BERT layers of this task, between the encoder and the pooling
    neighbours: int = 0  # compare with this many labelled training sentences per class; 0: use the embedding itself
    nearest: int = 0  # number of nearest neighbours whose votes are added to the embedding; 0: all cosines are features
    temperature: float = 0.05  # of the votes; a lower temperature gives the nearest ones more weight
    dropout: float = 0.1
    label_smoothing: float = 0.0  # share of each target that is spread evenly over all classes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_below_one(self, "dropout", "label_smoothing")
        check_at_least(self, 1, "shared_depth")
        check(0 <= self.extra_layers <= 48, f"extra_layers = {self.extra_layers}: expected 0 to 48")
        check(
            not (self.extra_layers and self.pooling == "pooler"),
            'pooling = "pooler" belongs to the encoder: with extra_layers expected mean, cls or max',
        )
        check(0 <= self.neighbours <= 100_000, f"neighbours = {self.neighbours}: expected 0 to 100000")
        check(
            not (self.neighbours and (self.extra_layers or self.shared_layers)),
            "neighbours: compares the encoder's own embeddings, so extra_layers and shared_layers must be unset",
        )
        total = max(1, self.neighbours * len(CLASSES[self.data]))
        check(0 <= self.nearest < total, f"nearest = {self.nearest}: expected fewer than the {total} neighbours")
        check(self.temperature > 0, f"temperature = {self.temperature}: expected above 0")


class TokenLayers(nn.Module):
    """`depth` layers like the encoder's, newly initialised, with the encoder's dropout; hidden rows [N, H] -> [n, H].

    They process all N rows of the packed batch, also those of other tasks, because shapes must not depend on the data. A
    recipe saves this work with a stage that trains this task alone.
    """

    def __init__(self, config: BertConfig, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: TaskInput, pooling: Mode) -> Tensor:
        """One vector per example [n, H], for tasks with one sentence per example."""
        hidden = inputs.hidden.to(torch.promote_types(inputs.hidden.dtype, torch.float32))
        rows = Sentences(inputs.cu_seqlens, inputs.max_seqlen, hidden.shape[0])
        plan = fused.plan(self, None, self.layers, read_layer)
        hidden = through(AutogradPass(), rows, hidden, self.layers, plan.layers)
        n = inputs.embeddings[0].shape[0]
        return pool(hidden, inputs.cu_seqlens[inputs.first : inputs.first + n + 1], pooling)


class SentimentHead(Head):
    """Class scores [n, C] of single sentences."""

    options: SentimentOptions

    def __init__(self, options: SentimentOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__()
        self.options = options
        width = config.hidden_size
        self.layers = TokenLayers(config, options.extra_layers) if options.extra_layers else None
        self.stack = shared_stack(options, width, shared)
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
            features = self.neighbours(x)
            x = torch.cat([x, features], dim=-1) if self.options.nearest else features
        x = F.dropout(x, self.options.dropout, self.training)
        if self.stack is not None:
            x = self.stack(x)
        return HeadOutput(self.output(x))

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return F.cross_entropy(output.scores, labels.long(), label_smoothing=self.options.label_smoothing)

    def logits(self, output: HeadOutput) -> Tensor:
        return output.scores

    def labelled_sentences(self) -> LabelledSentences | None:
        return self.neighbours

    def probabilities(self, output: HeadOutput) -> Tensor:
        return output.scores.softmax(-1)


@register("sentiment")
class SentimentTask(Task):
    Options: ClassVar[type] = SentimentOptions
    head_class: ClassVar[type] = SentimentHead
    stem: ClassVar[str] = "sst"
    header: ClassVar[str] = "Predicted_Sentiment"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASSES[self.options.data]
