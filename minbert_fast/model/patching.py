# SPDX-License-Identifier: Apache-2.0
"""Existing models made fast in place: every transformers.BertModel inside takes the fused path of this package.

    model = AutoModelForSequenceClassification.from_pretrained(...)      # or SentenceTransformer(...), or a BertModel
    minbert_fast.patch(model)                                            # the same object, weights, state_dict and outputs

The modules stay the very same objects: optimizers, `state_dict`, `save_pretrained`, DDP, the transformers Trainer notice
nothing. A call for what the fused path does not have (attention maps, hidden states of every layer, embeddings as input,
decoding) runs the stock forward, as does a model whose modules are not what they were (adapters, hooks, other layers).
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError
from minbert_fast.model import fused
from minbert_fast.model.config import BertConfig
from minbert_fast.model.passes import AutogradPass, DenseTokens, through
from minbert_fast.ops import backend

M = TypeVar("M", bound=nn.Module)

_OURS = "_minbert_fast"  # attribute of a patched model: the reasons it has warned of
_SERVED = ("input_ids", "attention_mask", "token_type_ids")  # the first arguments of the stock forward, in its order
#: `num_items_in_batch` is meant for a loss; models with a loss hand it through.
_HARMLESS = ("return_dict", "num_items_in_batch")


def patch(model: M) -> M:
    """Makes every transformers.BertModel in `model` (or `model` itself) fast, in place; returns `model`.

    Outputs at positions with mask 0 are zeros instead of numbers that mean nothing; all others are the same up to
    rounding, in training up to the dropout masks drawn. Raises ConfigError where there is no such model inside, or where
    one is not the BERT of this package (another activation, relative positions, a decoder). Patching twice does nothing.
    """
    found: list[Any] = [module for module in model.modules() if _is_stock(module)]
    if not found:
        raise ConfigError(f"{type(model).__name__}: holds no transformers.BertModel that could be patched")
    for bert in found:
        BertConfig.from_mapping(bert.config.to_dict(), type(bert).__name__)
    for bert in found:
        if not hasattr(bert, _OURS):
            setattr(bert, _OURS, set())
            _bind(bert, _forward_of(type(bert).forward))
    return model


def _bind(bert: Any, forward: Callable[..., Any]) -> None:
    """Gives a model, and every replica that DataParallel makes of it, `forward` as its own method."""

    def replicate(self: Any) -> Any:
        replica = type(self)._replicate_for_data_parallel(self)
        _bind(replica, forward)
        return replica

    bert.forward = types.MethodType(forward, bert)
    bert._replicate_for_data_parallel = types.MethodType(replicate, bert)


def _stock_class(module: nn.Module) -> type | None:
    """transformers' BertModel if `module` is one, told without importing transformers."""
    classes = type(module).__mro__
    return next((c for c in classes if c.__name__ == "BertModel" and c.__module__.startswith("transformers.")), None)


def _is_stock(module: nn.Module) -> bool:
    return _stock_class(module) is not None


def _forward_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)  # the Trainer reads the signature
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        given = dict(zip(_SERVED, arguments, strict=False)) | options
        if len(arguments) > len(_SERVED) or not _serves(self, given):
            return stock(self, *arguments, **options)
        return _fast(self, given)

    return forward


def _serves(model: Any, given: dict[str, Any]) -> bool:
    """Whether the fused path computes what this call asks for."""
    extras = (v for name, v in given.items() if name not in _SERVED and name not in _HARMLESS)
    if any(value is not None and value is not False for value in extras):
        return False
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None or (mask is not None and mask.dim() != 2):
        return False
    if model.config.output_attentions or model.config.output_hidden_states or not _exact(model):
        return False
    positions: int = model.embeddings.position_embeddings.num_embeddings
    return bool(ids.shape[1] <= positions)


def _fast(model: Any, given: dict[str, Any]) -> Any:
    """The stock model's output by the fused path."""
    ids, mask, kinds = (given.get(name) for name in _SERVED)
    assert ids is not None
    mask = torch.ones_like(ids) if mask is None else mask
    kinds = torch.zeros_like(ids) if kinds is None else kinds
    layers = model.encoder.layer
    # The flag is the encoder's up to transformers 4, and its layers' since.
    asked = any(getattr(place, "gradient_checkpointing", False) for place in (model.encoder, *layers))
    recompute = asked and model.training and torch.is_grad_enabled()
    rows, run = DenseTokens.read(ids, mask, kinds, backend.drops_padding(ids)), AutogradPass()
    parts = [_layer_parts(layer) for layer in layers]
    hidden = run.embed(rows, _embedding_parts(model.embeddings))
    hidden = rows.rectangle(through(run, rows, hidden, layers, parts, recompute))
    # Autocast leaves bf16, where the stock model ends in fp32.
    hidden = hidden.to(model.embeddings.word_embeddings.weight.dtype)
    pooled = None if model.pooler is None else model.pooler(hidden)
    wanted = given.get("return_dict")
    if not (model.config.return_dict if wanted is None else wanted):
        return hidden, pooled
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


# ---- What the fused path assumes of transformers' tree -------------------------------------------------------------


@fused.constant_when_compiled
def _exact(model: Any) -> bool:
    """Whether all modules are what the fused path assumes; warns once per reason where they are not."""
    plan = fused.plan(model, lambda: _read_embedding(model), _layers(model), functools.partial(_read_layer, model))
    reasons = list(plan.reasons)
    for number, parts in enumerate(plan.layers):
        # Attention reads its dropout's p and its own mode, not the dropout's mode.
        if (
            parts is not None
            and parts.probability_dropout.training != model.encoder.layer[number].attention.self.training
        ):
            reasons.append(f"encoder.layer.{number}.attention.self.dropout is in another mode than its parent")
            break
    warned = getattr(model, _OURS)
    for reason in reasons:
        if reason not in warned:
            warned.add(reason)
            warnings.warn(f"patched BertModel: {reason}, so it runs the stock forward", stacklevel=5)
    return not reasons


def _layers(model: Any) -> list[nn.Module]:
    layers = getattr(model.encoder, "layer", ())
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _read_embedding(model: Any) -> fused.Embedding:
    """The parts of the embeddings; raises fused.NotExactError where a module outside the layers is another one."""
    classes = vars(sys.modules[_stock_class(model).__module__])
    fused.expect(model.embeddings, classes["BertEmbeddings"])
    fused.expect(model.encoder, classes["BertEncoder"])
    fused.expect(model.encoder.layer, nn.ModuleList)
    return fused.exact(_embedding_parts(model.embeddings))


def _read_layer(model: Any, layer: Any) -> fused.Layer:
    """The parts of a layer; raises fused.NotExactError where it is not as transformers builds it."""
    classes = vars(sys.modules[_stock_class(model).__module__])
    fused.expect(layer, classes["BertLayer"])
    fused.expect(layer.attention, classes["BertAttention"])
    attention = ("BertSelfAttention", "BertSdpaSelfAttention")  # the latter up to transformers 4
    fused.expect(layer.attention.self, *(classes[name] for name in attention if name in classes))
    fused.expect(layer.attention.output, classes["BertSelfOutput"])
    fused.expect(layer.intermediate, classes["BertIntermediate"])
    fused.expect(layer.output, classes["BertOutput"])
    activation = layer.intermediate.intermediate_act_fn
    if getattr(activation, "act", None) is not F.gelu:
        raise fused.NotExactError(layer.intermediate, f"has another activation than gelu ({activation!r:.60})")
    fused.expect(activation, sys.modules["transformers.activations"].GELUActivation)
    parts = fused.exact(_layer_parts(layer))
    heads, width = parts.heads, layer.attention.self.attention_head_size
    if heads * width != parts.attention_norm.weight.shape[0]:
        raise fused.NotExactError(layer.attention.self, f"has {heads} heads of {width}")
    return parts


def _embedding_parts(stock: Any) -> fused.Embedding:
    tables = (stock.word_embeddings, stock.position_embeddings, stock.token_type_embeddings)
    return fused.Embedding(*tables, stock.LayerNorm, stock.dropout)


def _layer_parts(stock: Any) -> fused.Layer:
    attention, joined, output = stock.attention.self, stock.attention.output, stock.output
    return fused.Layer(
        attention.num_attention_heads, attention.query, attention.key, attention.value, attention.dropout,
        joined.dense, joined.dropout, joined.LayerNorm,
        stock.intermediate.dense, output.dense, output.dropout, output.LayerNorm,
    )  # fmt: skip
