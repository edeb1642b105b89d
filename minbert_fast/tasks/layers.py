# SPDX-License-Identifier: Apache-2.0
"""BERT layers of one task, on top of the shared encoder's token rows, and a pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minbert_fast.model import fused
from minbert_fast.model.bert import BertLayer, read_layer
from minbert_fast.model.config import BertConfig
from minbert_fast.model.passes import AutogradPass, Sentences, through
from minbert_fast.ops.pooling import Mode, pool
from minbert_fast.tasks.base import TaskInput


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
