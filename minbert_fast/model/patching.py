# SPDX-License-Identifier: Apache-2.0
"""Existing models made fast in place: every transformers.BertModel inside gets the forward of the one here.

    model = AutoModelForSequenceClassification.from_pretrained(...)      # or SentenceTransformer(...), or a BertModel
    minbert_fast.patch(model)                                            # the same object, weights, state_dict and outputs

The parameters stay where they are, the very same objects: optimizers, `state_dict`, `save_pretrained`, DDP, the
transformers Trainer notice nothing. A call for what the fast path does not have (attention maps, hidden states of every
layer, embeddings as input, decoding) goes the stock way, as does a model whose layers were exchanged (adapters) or hooked.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from minbert_fast.common.schema import ConfigError
from minbert_fast.model import weights
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import BertConfig

M = TypeVar("M", bound=nn.Module)

_OURS = "_minbert_fast"  # attribute of a patched model
_SERVED = ("input_ids", "attention_mask", "token_type_ids")  # the first arguments of the stock forward, in its order
_HARMLESS = (
    "return_dict",
    "num_items_in_batch",
)  # the latter is meant for a loss, and handed through by models with one
_PLAIN = (nn.Linear, nn.Embedding, nn.LayerNorm)


def patch(model: M) -> M:
    """Makes every transformers.BertModel in `model` (or `model` itself) fast, in place; returns `model`.

    Outputs at positions with mask 0 are zeros instead of numbers that mean nothing; all others are the same up to
    rounding, in training up to the dropout masks drawn. Raises ConfigError where there is no such model inside, or where
    one is not the BERT of this package (another activation, relative positions, a decoder). Patching twice does nothing.
    """
    found: list[Any] = [module for module in model.modules() if _is_stock(module)]
    if not found:
        raise ConfigError(f"{type(model).__name__}: holds no transformers.BertModel that could be patched")
    configs = [BertConfig.from_mapping(bert.config.to_dict(), type(bert).__name__) for bert in found]
    for bert, config in zip(found, configs, strict=True):
        if not hasattr(bert, _OURS):
            # Past nn.Module's own bookkeeping: no second set of parameters, no new names in the state_dict.
            object.__setattr__(bert, _OURS, _Twin(bert, config))
            bert.forward = types.MethodType(_forward_of(type(bert).forward), bert)
    return model


def _is_stock(module: nn.Module) -> bool:
    """Whether `module` is transformers' BertModel, told without importing transformers."""
    return any(c.__name__ == "BertModel" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def _forward_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)  # the Trainer reads the signature
    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        given = dict(zip(_SERVED, arguments, strict=False)) | options
        twin: _Twin = getattr(self, _OURS)
        if len(arguments) > len(_SERVED) or not twin.serves(self, given):
            return stock(self, *arguments, **options)
        return twin.run(self, given)

    return forward


class _Twin:
    """This package's BertModel around the parameters of a stock one."""

    def __init__(self, stock: Any, config: BertConfig) -> None:
        with torch.device("meta"):
            self.model = BertModel(config)
        self._warned = False
        self._pairs = list(_pairs(stock, self.model))
        self.bind()

    def serves(self, stock: Any, given: dict[str, Any]) -> bool:
        """Whether the fast path computes what this call asks for."""
        extras = (v for name, v in given.items() if name not in _SERVED and name not in _HARMLESS)
        if any(value is not None and value is not False for value in extras):
            return False
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or ids.shape[1] > self.model.config.max_position_embeddings:
            return False
        if mask is not None and mask.dim() != 2:
            return False
        if stock.config.output_attentions or stock.config.output_hidden_states:
            return False
        return torch.compiler.is_compiling() or self.bind()

    def bind(self) -> bool:
        """Takes over the parameters that the stock model has now; False where a layer is no longer what it was."""
        for parent, name, ours in self._pairs:
            theirs: Any = parent._modules[name]
            if type(theirs) not in _PLAIN or _hooked(theirs):
                if not self._warned:
                    what = f"{name} has hooks" if type(theirs) in _PLAIN else f"{name} is a {type(theirs).__name__}"
                    warnings.warn(f"patched BertModel: {what}, so it runs the stock way", stacklevel=4)
                    self._warned = True
                return False
            ours._parameters.update(theirs._parameters)
        return True

    def run(self, stock: Any, given: dict[str, Any]) -> Any:
        """The stock model's output, computed here."""
        model = self.model
        model.training = stock.training
        # In the encoder up to transformers 4, in its layers since.
        places = (stock.encoder, *stock.encoder.layer)
        model.gradient_checkpointing = any(getattr(place, "gradient_checkpointing", False) for place in places)
        hidden = model.last_hidden_state(*(given.get(name) for name in _SERVED))  # type: ignore[arg-type]
        hidden = hidden.to(
            model.word_embedding.weight.dtype
        )  # autocast leaves bf16, where the stock model ends in fp32
        pooled = None if stock.pooler is None else model.pool(hidden[:, 0])
        wanted = given.get("return_dict")
        if not (stock.config.return_dict if wanted is None else wanted):
            return hidden, pooled
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


def _hooked(module: Any) -> bool:
    """Whether a layer has forward hooks, but for the one that transformers' gradient checkpointing adds (no need here)."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__name__", "") != "make_inputs_require_grads" for hook in hooks)


def _pairs(stock: Any, ours: BertModel) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent of a stock layer, the layer's name in it, our layer) for every layer that has parameters."""
    for name, module in ours.named_modules():
        if isinstance(module, _PLAIN):
            path = weights.to_stock_name(f"{name}.weight").removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            if stock.pooler is not None or not path.startswith("pooler."):
                yield stock.get_submodule(parent), leaf, module
