# SPDX-License-Identifier: Apache-2.0
"""BERT layers that belong to one task: on top of the shared encoder's token rows, with a pooling of their own."""

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
    """`depth` layers like the encoder's, drawn afresh, with the encoder's dropout; hidden rows [N, H] -> [n, H].

    They run over all rows of the packed batch, which keeps shapes static: a recipe gives them a stage of their own.
    """

    def __init__(self, config: BertConfig, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: TaskInput, pooling: Mode) -> Tensor:
        """One vector an example [n, H], for tasks of one sentence an example."""
        hidden = inputs.hidden.to(torch.promote_types(inputs.hidden.dtype, torch.float32))
        rows = Sentences(inputs.cu_seqlens, inputs.max_seqlen, hidden.shape[0])
        plan = fused.plan(self, None, self.layers, read_layer)
        hidden = through(AutogradPass(), rows, hidden, self.layers, plan.layers)
        n = inputs.embeddings[0].shape[0]
        return pool(hidden, inputs.cu_seqlens[inputs.first : inputs.first + n + 1], pooling)
