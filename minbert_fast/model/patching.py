# SPDX-License-Identifier: Apache-2.0
"""Existing models made fast in place: every transformers.BertModel inside takes the fused path of this package.

    model = AutoModelForSequenceClassification.from_pretrained(...)      # or SentenceTransformer(...), or a BertModel
    minbert_fast.patch(model)                                            # the same object, weights, state_dict and outputs

The modules stay the same objects, so optimizers, `state_dict`, `save_pretrained`, DDP and the transformers Trainer work as
before. The stock forward runs for what the fused path lacks: attention maps, hidden states of every layer, embeddings as
input, decoding. It also runs for a model whose modules were changed (adapters, hooks, other layers).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from minbert_fast.common.schema import ConfigError
from minbert_fast.model import fused
from minbert_fast.model.config import BertConfig
from minbert_fast.model.passes import encode_rectangle

M = TypeVar("M", bound=nn.Module)

_OURS = "_minbert_fast"  # attribute of a patched model: the reasons it has warned of
_SERVED = ("input_ids", "attention_mask", "token_type_ids")  # the first arguments of the stock forward, in its order
#: `num_items_in_batch` is meant for a loss; models with a loss hand it through.
_HARMLESS = ("return_dict", "num_items_in_batch")


def patch(model: M) -> M:
    """Makes every transformers.BertModel in `model` (or `model` itself) fast, in place; returns `model`.

    Outputs at positions with mask 0 become zeros. All others are the same up to rounding, and in training up to the
    dropout masks drawn. Raises ConfigError if `model` holds no such model, or one that this package cannot compute
    (another activation, relative positions, a decoder, a forward of its own). Patching twice does nothing.
    """
    found: list[Any] = [module for module in model.modules() if _stock_class(module)]
    if not found:
        raise ConfigError(f"{type(model).__name__}: holds no transformers.BertModel that could be patched")
    fresh = [bert for bert in found if not hasattr(bert, _OURS)]
    for bert in fresh:
        BertConfig.from_mapping(bert.config.to_dict(), type(bert).__name__)
        stock: Any = _stock_class(bert)
        if getattr(bert.forward, "__func__", None) is not stock.forward:
            raise ConfigError(
                f"{type(bert).__name__}: has a forward of its own, expected that of transformers.BertModel"
            )
    for bert in fresh:
        setattr(bert, _OURS, set())
        bert.__class__ = _patched(bert.__class__)
    return model


def _stock_class(module: nn.Module) -> type | None:
    """transformers' BertModel if `module` is one, told without importing transformers."""
    classes = type(module).__mro__
    return next((c for c in classes if c.__name__ == "BertModel" and c.__module__.startswith("transformers.")), None)


@functools.cache
def _patched(stock: Any) -> Any:
    """The class `stock` with the fast forward. It keeps its name, which transformers writes into config.json."""

    @functools.wraps(stock.forward)  # the Trainer reads the signature
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        given = dict(zip(_SERVED, arguments, strict=False)) | options
        if len(arguments) > len(_SERVED) or not _serves(self, given):
            return stock.forward(self, *arguments, **options)
        return _fast(self, given)

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (stock,), *stock.__reduce_ex__(self, protocol)[2:]

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), names | {"forward": forward, "__reduce_ex__": reduce})


def _blank(stock: Any) -> Any:
    """A patched model without state, for copies and pickles."""
    cls = _patched(stock)
    return cls.__new__(cls)


def _serves(model: Any, given: dict[str, Any]) -> bool:
    """Whether the fused path computes what this call asks for."""
    extras = (value for name, value in given.items() if name not in _SERVED and name not in _HARMLESS)
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    return (
        all(value is None or value is False for value in extras)
        and ids is not None
        and not ids.is_floating_point()
        and (mask is None or mask.shape == ids.shape)
        and not (model.config.output_attentions or model.config.output_hidden_states or model.config.is_decoder)
        and _exact(model)
        and ids.shape[1] <= model.embeddings.position_embeddings.num_embeddings
    )


def _fast(model: Any, given: dict[str, Any]) -> Any:
    """The stock model's output by the fused path."""
    ids, mask, kinds = (given.get(name) for name in _SERVED)
    assert ids is not None
    mask = torch.ones_like(ids) if mask is None else mask
    layers = model.encoder.layer
    # The flag is the encoder's up to transformers 4, and its layers' since.
    flagged = any(getattr(place, "gradient_checkpointing", False) for place in (model.encoder, *layers))
    recompute = flagged and model.training and torch.is_grad_enabled()
    plan = fused.Plan(_embedding_parts(model.embeddings), tuple(_layer_parts(layer) for layer in layers))
    hidden = encode_rectangle(ids, mask, kinds, layers, plan, recompute)
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
    read_layer = functools.partial(_read_layer, model)
    extra = [*map(fused.version, _buffers(model)), model.config._attn_implementation, *_functions(model)]
    plan = fused.plan(model, lambda: _read_embedding(model), _layers(model), read_layer, extra)
    reasons = list(plan.reasons)
    for number, (layer, parts) in enumerate(zip(_layers(model), plan.layers, strict=True)):
        # Attention reads its dropout's p and its own mode, not the dropout's mode.
        if parts is not None and parts.probability_dropout.training != layer.attention.self.training:
            reasons.append(f"encoder.layer.{number}.attention.self.dropout is in another mode than its parent")
            break
    words = [f"patched BertModel: {reason}, so it runs the stock forward" for reason in reasons]
    fused.warn_once(getattr(model, _OURS), words, stacklevel=5)
    return not reasons


def _buffers(model: Any) -> list[Any]:
    """The positions [1, S], and the types [1, S] of a call without `token_type_ids`; None for one that is not there."""
    return [getattr(model.embeddings, name, None) for name in ("position_ids", "token_type_ids")]


def _layers(model: Any) -> list[Any]:
    layers = getattr(model.encoder, "layer", ())
    return list(layers) if isinstance(layers, nn.ModuleList) else []


def _expect(model: Any, root: nn.Module, paths: Mapping[str, Sequence[str]]) -> None:
    """Raises fused.NotExactError unless the modules at `paths` below `root` have one of the classes named there."""
    known = vars(sys.modules[_stock_class(model).__module__])
    for path, names in paths.items():
        fused.expect(root.get_submodule(path), *(known[name] for name in names if name in known))


def _read_embedding(model: Any) -> fused.Embedding:
    """The parts of the embeddings; raises fused.NotExactError where a module outside the layers is another one."""
    _expect(model, model, {"embeddings": ["BertEmbeddings"], "encoder": ["BertEncoder"]})
    fused.expect(model.encoder.layer, nn.ModuleList)
    for function in filter(None, _functions(model)):
        if not _of_transformers(function):
            name = getattr(function, "__qualname__", repr(function))
            raise fused.NotExactError(model, f"calls {name:.60} in the place of a function of transformers")
    positions, kinds = _buffers(model)
    fused.expect_counting(model.embeddings, positions)
    if kinds is not None and fused.has_values(kinds) and kinds.any():
        raise fused.NotExactError(model.embeddings, "has token_type_ids that are not 0")
    return fused.exact(_embedding_parts(model.embeddings))


_LAYER_CLASSES = {
    "": ["BertLayer"],
    "attention": ["BertAttention"],
    "attention.self": ["BertSelfAttention", "BertSdpaSelfAttention"],  # the latter up to transformers 4
    "attention.output": ["BertSelfOutput"],
    "intermediate": ["BertIntermediate"],
    "output": ["BertOutput"],
}


def _read_layer(model: Any, layer: Any) -> fused.Layer:
    """The parts of a layer; raises fused.NotExactError where it is not as transformers builds it."""
    _expect(model, layer, _LAYER_CLASSES)
    activation = layer.intermediate.intermediate_act_fn
    if getattr(activation, "act", None) is not fused.GELU:
        raise fused.NotExactError(layer.intermediate, f"has another activation than gelu ({activation!r:.60})")
    fused.expect(activation, sys.modules["transformers.activations"].GELUActivation)
    attention = layer.attention.self
    scale = attention.attention_head_size**-0.5
    found = getattr(attention, "scaling", scale)
    if not isinstance(found, float) or found != scale or getattr(attention, "is_causal", False):  # a tensor may learn
        raise fused.NotExactError(attention, "has another scaling, or is causal")
    return fused.exact_layer(_layer_parts(layer), attention)


_CLASSES = ("BertModel", "BertEmbeddings", "BertEncoder", *chain.from_iterable(_LAYER_CLASSES.values()))


def _functions(model: Any) -> list[Any]:
    """The functions of transformers that the fused path replaces. A program may replace them too, for all models."""
    known = vars(sys.modules[_stock_class(model).__module__])
    functions = [known[name].forward for name in _CLASSES if name in known]
    attention = known.get("ALL_ATTENTION_FUNCTIONS", {}).get(model.config._attn_implementation)
    return [*functions, known["BertLayer"].feed_forward_chunk, known.get("eager_attention_forward"), attention]


def _of_transformers(function: Any) -> bool:
    """Whether transformers defines a function and all that it wraps."""
    while function is not None:
        if not getattr(function, "__globals__", {}).get("__name__", "").startswith("transformers."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


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
