# SPDX-License-Identifier: Apache-2.0
"""The naive encoder, padded and eager: the honest baseline of the benchmarks, what a course project has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def encoder(model: Any, input_ids: Tensor, attention_mask: Tensor, token_types: Tensor | None = None) -> Tensor:
    """The encoder of a `minbert_fast.BertModel` as a course project computes it: padded, additive mask, eager.

    input_ids, attention_mask, token_types (None: 0) [B, S] -> last hidden state [B, S, H]. Dropout is active where
    `model.training` is.
    """
    config = model.config
    heads, length = config.num_attention_heads, input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)[None]
    hidden: Tensor = model.word_embedding(input_ids) + model.pos_embedding(positions)
    hidden = hidden + model.tk_type_embedding(torch.zeros_like(input_ids) if token_types is None else token_types)
    hidden = F.dropout(model.embed_layer_norm(hidden), config.hidden_dropout_prob, model.training)
    extended = (1.0 - attention_mask[:, None, None, :].to(hidden.dtype)) * -10000.0

    def split(x: Tensor) -> Tensor:  # [B, S, H] -> [B, h, S, d]
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    for layer in model.bert_layers:
        attend = layer.self_attention
        q, k, v = split(attend.query(hidden)), split(attend.key(hidden)), split(attend.value(hidden))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + extended  # [B, h, S, S]
        weights = F.dropout(scores.softmax(-1), config.attention_probs_dropout_prob, model.training)
        context = (weights @ v).transpose(1, 2).reshape_as(hidden)
        branch = F.dropout(layer.attention_dense(context), config.hidden_dropout_prob, model.training)
        hidden = layer.attention_layer_norm(hidden + branch)
        branch = layer.out_dense(F.gelu(layer.interm_dense(hidden)))
        branch = F.dropout(branch, config.hidden_dropout_prob, model.training)
        hidden = layer.out_layer_norm(hidden + branch)
    return hidden
