# SPDX-License-Identifier: Apache-2.0
"""Shared by kinds with one text per example: options, further encoder layers, the head's layers.

embedding of the text -> [neighbours] -> dropout -> [shared stack] -> linear -> scores
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import check
from minbert_fast.model import fused
from minbert_fast.model.bert import BertLayer, read_layer
from minbert_fast.model.config import BertConfig
from minbert_fast.model.passes import AutogradPass, through
from minbert_fast.model.rows import Sentences
from minbert_fast.ops.pooling import pool
from minbert_fast.tasks.base import HeadOutput, TaskInput
from minbert_fast.tasks.neighbours import LabelledSentences
from minbert_fast.tasks.stack import StackHead, StackOptions, shared_stack


@dataclass(frozen=True)
class SingleOptions(StackOptions):
    """Options of a task with one text per example, in addition to those of every task."""

    extra_layers: int = 0  # BERT layers of this task, between the encoder and the pooling

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.extra_layers <= 48, f"extra_layers = {self.extra_layers}: expected 0 to 48")


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

    def forward(self, inputs: TaskInput) -> Tensor:
        """One vector per example [n, H], for tasks with one sentence per example."""
        assert inputs.pooling != "pooler", "MultitaskModel refuses it"
        hidden = inputs.hidden.to(torch.promote_types(inputs.hidden.dtype, torch.float32))
        rows = Sentences(inputs.cu_seqlens, inputs.max_seqlen, hidden.shape[0])
        plan = fused.plan(self, None, self.layers, read_layer)
        hidden = through(AutogradPass(), rows, hidden, self.layers, plan.layers)
        n = inputs.embeddings[0].shape[0]
        return pool(hidden, inputs.cu_seqlens[inputs.first : inputs.first + n + 1], inputs.pooling)


class SingleHead(StackHead):
    """Scores [n, outputs] of single texts; [n] for one output."""

    options: SingleOptions

    def __init__(
        self,
        options: SingleOptions,
        config: BertConfig,
        shared: dict[str, nn.Module],
        outputs: int,
        neighbours: LabelledSentences | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        width = config.hidden_size
        self.layers = TokenLayers(config, options.extra_layers) if options.extra_layers else None
        self.stack = shared_stack(options, width, shared)
        self.neighbours = neighbours
        if neighbours is not None:
            width = neighbours.features + (width if neighbours.nearest else 0)
        self.output = nn.Linear(width, outputs)

    def forward(self, inputs: TaskInput) -> HeadOutput:
        if self.layers is None:
            (x,) = inputs.embeddings
        else:
            x = self.layers(inputs)
        if self.neighbours is not None:
            features = self.neighbours(x)
            x = torch.cat([x, features], dim=-1) if self.neighbours.nearest else features
        x = F.dropout(x, self.options.dropout, self.training)
        if self.stack is not None:
            x = self.stack(x)
        scores = self.output(x)
        return HeadOutput(scores.squeeze(-1) if self.output.out_features == 1 else scores)

    def labelled_sentences(self) -> LabelledSentences | None:
        return self.neighbours
