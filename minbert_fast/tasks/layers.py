# SPDX-License-Identifier: Apache-2.0
"""BERT layers that belong to one task: on top of the shared encoder's token rows, pooled anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.model.bert import BertLayer
from minbert_fast.model.config import BertConfig
from minbert_fast.model.passes import AutogradPass
from minbert_fast.ops.pooling import Mode, pool
from minbert_fast.tasks.base import TaskInput


@dataclass(frozen=True)
class _Sentences:
    """Whose rows attend to each other, as a pass asks for it."""

    inputs: TaskInput

    def attention(self, qkv: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
        scale = 1.0 / math.sqrt(qkv.shape[-1])
        return ops.attention(qkv, self.inputs.cu_seqlens, self.inputs.max_seqlen, scale, p, seed, site)


class TokenLayers(nn.Module):
    """`depth` layers like the encoder's, drawn afresh, with the encoder's dropout; hidden rows [N, H] -> [n, H].

    They run over all rows of the packed batch, which keeps shapes static: a recipe gives them a stage of their own.
    """

    def __init__(self, config: BertConfig, depth: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: TaskInput, pooling: Mode) -> Tensor:
        """One vector an example [n, H], for tasks of one sentence an example."""
        run = AutogradPass(self.config, self.training)
        hidden = inputs.hidden.to(torch.promote_types(inputs.hidden.dtype, torch.float32))
        rows = _Sentences(inputs)
        for layer in self.layers:
            hidden = layer(hidden, run, run.attend(rows))
        n = inputs.embeddings[0].shape[0]
        return pool(hidden, inputs.cu_seqlens[inputs.first : inputs.first + n + 1], pooling)
