# SPDX-License-Identifier: Apache-2.0
"""A small model, a batch with padding anywhere, and the course's formulas written out as an oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast import BertConfig, BertModel

WIDTH = 48


def small(**changes: Any) -> BertModel:
    """A model of three layers with weights large enough that every change shows, in evaluation mode."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 80, "max_position_embeddings": 40, "initializer_range": 0.2,
    }  # fmt: skip
    model = BertModel(BertConfig(**(shape | changes))).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Word ids and mask [5, 11]: right padding, left padding, a hole, full, and a sentence without any token."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(5, 11, dtype=torch.int64)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    mask[2, 3:5] = 0
    mask[4] = 0
    return torch.randint(1, 97, (5, 11), generator=generator), mask


def attend(layer: Any, hidden: Tensor, extended: Tensor) -> Tensor:
    """The course's self-attention of a layer, each Linear called as the module that it is."""
    attention = layer.self_attention

    def split(x: Tensor) -> Tensor:  # [B, S, H] -> [B, h, S, d]
        return x.view(*x.shape[:2], attention.num_attention_heads, -1).transpose(1, 2)

    q, k, v = (split(m(hidden)) for m in (attention.query, attention.key, attention.value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + extended
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape_as(hidden)


def course_layer(layer: Any, hidden: Tensor, extended: Tensor, activation: Any = F.gelu) -> Tensor:
    """The course's BertLayer without dropout."""
    hidden = layer.attention_layer_norm(hidden + layer.attention_dense(attend(layer, hidden, extended)))
    return layer.out_layer_norm(hidden + layer.out_dense(activation(layer.interm_dense(hidden))))


def course_embed(model: BertModel, ids: Tensor) -> Tensor:
    total = model.word_embedding(ids) + model.pos_embedding.weight[: ids.shape[1]] + model.tk_type_embedding.weight[0]
    return model.embed_layer_norm(total)


def course(model: BertModel, ids: Tensor, mask: Tensor, activation: Any = F.gelu) -> Tensor:
    """The last hidden state [B, S, H] by the course's formulas, zeros where the mask is 0, without dropout."""
    hidden = course_embed(model, ids)
    extended = (1.0 - mask[:, None, None, :].float()) * -10000.0
    for layer in model.bert_layers:
        hidden = course_layer(layer, hidden, extended, activation)
    return hidden * mask[:, :, None]


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def replicate(model: nn.Module) -> dict[nn.Module, Any]:
    """Each module's replica, as torch.nn.parallel.replicate makes them; their weights are plain tensors."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        replica._modules = {name: copies[child] for name, child in module._modules.items() if child is not None}
        for name, p in module._parameters.items():
            setattr(replica, name, None if p is None else p.clone())
    return copies
