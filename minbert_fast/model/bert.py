# SPDX-License-Identifier: Apache-2.0
"""The drop-in minBERT (Devlin et al. 2019): the course's module tree, and one fused path that computes the same faster.

    model(input_ids, attention_mask) -> {"last_hidden_state": [B, S, H], "pooler_output": [B, H]}   course code
    model(packed_batch)              -> {"last_hidden_state": [N, H]}                               no padding

Every module works on its own and has the course's signature. The fused path, in the second half of this file, is an
optimisation: it computes the parts that are exactly as they were built (`fused.py` decides which) and calls all others.

Shapes: B sentences, S positions, N packed tokens, H hidden, h heads, d = H / h, F intermediate.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.device import shapes_alone
from minbert_fast.common.schema import ConfigError
from minbert_fast.model import fused, passes, weights
from minbert_fast.model.config import BertConfig
from minbert_fast.model.packing import PackedBatch
from minbert_fast.model.rows import DenseRows, PackedRows, expanded, extended_mask
from minbert_fast.model.weight_files import WeightsError, some


class BertSelfAttention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def transform(self, x: Tensor, linear_layer: nn.Module) -> Tensor:
        """x [B, S, H] through a linear layer, split into heads [B, h, S, d]."""
        projected: Tensor = linear_layer(x)
        return projected.view(*x.shape[:2], self.num_attention_heads, self.attention_head_size).transpose(1, 2)

    def attention(self, key: Tensor, query: Tensor, value: Tensor, attention_mask: Tensor) -> Tensor:
        """key, query, value [B, h, S, d] -> [B, S, H]; attention_mask [B, 1, 1, S] is added to the scores [B, h, S, S]."""
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.attention_head_size) + attention_mask
        probabilities = self.dropout(scores.softmax(-1))
        context: Tensor = probabilities @ value
        return context.transpose(1, 2).flatten(2)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden_states [B, S, H], attention_mask [B, 1, 1, S] (0 attended, -10000 not) -> [B, S, H]."""
        key = self.transform(hidden_states, self.key)
        query = self.transform(hidden_states, self.query)
        value = self.transform(hidden_states, self.value)
        return self.attention(key, query, value, attention_mask)


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attention = BertSelfAttention(config)
        self.attention_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.interm_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.interm_af: Callable[[Tensor], Tensor] = F.gelu
        self.out_dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.out_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_dropout = nn.Dropout(config.hidden_dropout_prob)

    def add_norm(
        self, input: Tensor, output: Tensor, dense_layer: nn.Module, dropout: nn.Module, ln_layer: nn.Module
    ) -> Tensor:
        """LayerNorm(input + dropout(dense(output))): input [B, S, H], output [B, S, H or F] -> [B, S, H]."""
        normed: Tensor = ln_layer(input + dropout(dense_layer(output)))
        return normed

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden_states [B, S, H], attention_mask [B, 1, 1, S] (0 attended, -10000 not) -> [B, S, H]."""
        context = self.self_attention(hidden_states, attention_mask)
        hidden_states = self.add_norm(
            hidden_states, context, self.attention_dense, self.attention_dropout, self.attention_layer_norm
        )
        inner = self.interm_af(self.interm_dense(hidden_states))  # [B, S, F]
        return self.add_norm(hidden_states, inner, self.out_dense, self.out_dropout, self.out_layer_norm)


class BertModel(nn.Module):
    """BERT with the course's attribute names; weights from `from_pretrained`, or random as before BERT's pre-training.

    The model keeps its own copy of `config`, which may be the starter's or transformers' too (`BertConfig.of`). Raises
    ConfigError for a configuration that is impossible.
    """

    position_ids: Tensor  # [1, positions], a buffer

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config = BertConfig.of(config)
        self.name_or_path = config.name_or_path
        self.gradient_checkpointing = False  # True: the backward pass computes each layer's activations again
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embed_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embed_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        self.bert_layers = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.pooler_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.pooler_af = nn.Tanh()
        self._built = copy.copy(config)
        self._warned: set[str] = set()
        self.init_weights()

    def init_weights(self) -> None:
        """Draws random weights, as BERT does before its pre-training."""
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        # A replica of DataParallel has plain attributes instead of parameters.
        attributes = (value for module in self.modules() for value in vars(module).values())
        replicated = (t for t in attributes if isinstance(t, Tensor) and t.is_floating_point())
        return next(itertools.chain(self.parameters(), replicated)).dtype

    def forward(
        self,
        input_ids: Tensor | PackedBatch,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The last hidden state, and for rectangular input the pooler's output.

        input_ids [B, S] word ids, attention_mask [B, S] (1 attended, 0 not, anywhere; None: all attended),
        token_type_ids [B, S] (None: all 0); or one PackedBatch. Positions with mask 0 give zeros and influence nothing.
        Sentences longer than the model's positions are truncated with a warning (their outputs beyond are zeros).
        Raises ValueError for ids that are no integers, and for a mask of another shape.
        """
        if isinstance(input_ids, PackedBatch):
            return {"last_hidden_state": self.encode_packed(passes.AutogradPass(), input_ids)}
        for name, ids in (("input_ids", input_ids), ("token_type_ids", token_type_ids)):
            if ids is not None and ids.is_floating_point():
                raise ValueError(f"{name} has dtype {ids.dtype}, expected integers")
        limit, length = self.position_ids.shape[1], input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = expanded(mask, input_ids.shape)
        if length > limit:
            longer = int((mask[:, limit:] != 0).any(1).sum())
            words = f"{longer} of {len(input_ids)} sentences exceed {limit} positions and were truncated"
            warnings.warn(words, stacklevel=2)
        types = None if token_type_ids is None else token_type_ids[:, :limit]
        hidden = self._hidden(input_ids[:, :limit], mask[:, :limit], types)
        if length > limit:
            hidden = F.pad(hidden, (0, 0, 0, length - limit))
        return {"last_hidden_state": hidden, "pooler_output": self.pool(hidden[:, 0])}

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """dropout(LayerNorm(word + position + type)): input_ids, token_type_ids (None: 0) [B, S] -> [B, S, H]."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        total = self.word_embedding(input_ids) + self.pos_embedding(self.position_ids[:, : input_ids.shape[1]])
        embedded: Tensor = self.embed_dropout(self.embed_layer_norm(total + self.tk_type_embedding(types)))
        return embedded

    def encode(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings [B, S, H] through all layers; attention_mask [B, S] as for `forward`."""
        plan = self.plan()
        if attention_mask.dim() != 2 or attention_mask.requires_grad or not any(plan.layers):
            return self._layers(hidden_states, attention_mask)
        mask = expanded(attention_mask, hidden_states.shape[:2])
        rows, run = DenseRows.of(mask), passes.AutogradPass()
        hidden, layers = rows.rows(hidden_states), self.bert_layers
        hidden = passes.through(run, rows, hidden, layers, plan.layers, self._recompute())
        return rows.rectangle(hidden).to(hidden_states.dtype)

    def pool(self, first: Tensor) -> Tensor:
        """The pooler: tanh(W h + b) of each sentence's first token [B, H]."""
        dtype = next((p.dtype for p in self.pooler_dense.parameters()), first.dtype)
        pooled: Tensor = self.pooler_af(self.pooler_dense(first.to(dtype)))
        return pooled

    def stock(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The last hidden state [B, S, H], with every module called and nothing fused."""
        return self._layers(self._embed(input_ids, token_type_ids), attention_mask)

    def _embed(self, input_ids: Tensor, types: Tensor | None) -> Tensor:
        return self.embed(input_ids) if types is None else self.embed(input_ids, types)  # a subclass may take no types

    def _layers(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Every layer as a module; positions with mask 0 give zeros."""
        extended = extended_mask(mask, hidden.dtype)
        for layer in self.bert_layers:
            hidden = passes.computed(passes.called, layer, hidden, extended, recompute=self._recompute())
        return hidden * (mask != 0)[:, :, None].to(hidden.dtype) if mask.dim() == 2 else hidden

    def _recompute(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    @staticmethod
    def get_extended_attention_mask(attention_mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The mask that layers add to their scores: [B, S] (1 attended, 0 not) -> [B, 1, 1, S] (0 attended, -10000 not)."""
        return extended_mask(attention_mask, dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Older checkpoints lack this buffer, newer ones have it.
        state_dict.setdefault(f"{prefix}position_ids", self.position_ids)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---- Weights -------------------------------------------------------------------------------------------------

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, output_loading_info: Literal[False] = False, **keywords: Any
    ) -> BertModel: ...

    @overload
    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, output_loading_info: Literal[True], **keywords: Any
    ) -> tuple[BertModel, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        config: BertConfig | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        output_loading_info: bool = False,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> BertModel | tuple[BertModel, dict[str, Any]]:
        """The encoder of a Hugging Face directory, a hub name, a course `.pt` file or a `.safetensors` file.

        Keywords mean what they mean to transformers. `state_dict` replaces the stored tensors (under the course's or
        Hugging Face's names). `output_loading_info` returns (model, {"missing_keys", "unexpected_keys", ...}). `dtype`,
        by its older name `torch_dtype`, is that of the parameters: "auto" takes the file's, None fp32. `subfolder` is a
        folder of the directory. `revision`, `cache_dir`, `token`, `force_download` and `local_files_only` go to the hub.
        `overrides` replace values of the configuration (say `hidden_dropout_prob=0.3`). A `.pt` file needs `config`,
        `num_attention_heads` or a `config.json` in its folder, unless it has the size of one of Google's BERTs, whose heads
        are 64 wide. A missing pooler and the modules that a subclass adds start as they are drawn, and a task's head is left
        out, each with a warning. Raises WeightsError or ConfigError naming the file and the mistake.
        """
        weights.check_overrides(overrides, inspect.signature(cls.from_pretrained).parameters)
        path = weights.resolve(
            str(name_or_path), subfolder=subfolder, revision=revision, cache_dir=cache_dir, token=token,
            force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip
        where = str(path) if state_dict is None else "state_dict"
        found, tensors, left = weights.read(path, state_dict)
        base = config or found or weights.infer_config(tensors, where, "num_attention_heads" in overrides)
        chosen = BertConfig.from_mapping({**vars(base), **overrides}, str(path))
        chosen.name_or_path = str(name_or_path)
        with shapes_alone():  # takes no memory for sizes that the file only declares
            wanted, plain = cls(chosen).state_dict(), BertModel(chosen).state_dict()
        own = [name for name in wanted if name not in plain and name not in tensors]  # modules that a subclass adds
        missing = weights.check_encoder({k: t for k, t in wanted.items() if k not in own}, tensors, where)
        model = cls(chosen).to(weights.chosen_dtype(dtype, torch_dtype, tensors))
        if missing:
            warnings.warn(f"{where} has no pooler: it starts from fresh random weights", stacklevel=2)
        if own:
            words = f"{where} has no {some(own)}: these start as {cls.__name__} draws them"
            warnings.warn(words, stacklevel=2)
        if left:
            warnings.warn(f"{where}: the encoder alone is loaded; left out: {some(left)}", stacklevel=2)
        model.load_state_dict(dict(tensors), strict=False)
        info = {
            "missing_keys": missing.union(own),
            "unexpected_keys": set(left),
            "mismatched_keys": set(),
            "error_msgs": [],
        }
        return (model.eval(), info) if output_loading_info else model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` as transformers' AutoModel loads them, bit for bit.

        Adapters of peft are merged into the weights that are written, not into the model. Raises WeightsError naming
        any other parameter that BERT does not have, and tensors of which `config.json` cannot tell the shape.
        """
        weights.write(Path(directory), *self._plain_state())

    def _plain_state(self) -> tuple[BertConfig, dict[str, Tensor]]:
        """The configuration and the weights of a plain model, adapters merged."""
        tensors = dict(self.state_dict())
        for name, module in self.named_modules():
            if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
                merged: Any = copy.deepcopy(module)
                if not merged.merged:
                    merged.merge()
                tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{name}.")}
                tensors |= {f"{name}.{key}": t for key, t in merged.get_base_layer().state_dict().items()}
        config = dataclasses.replace(self.config, num_hidden_layers=len(self.bert_layers))
        with shapes_alone():
            wanted = BertModel(config).state_dict()
        foreign, missing = [k for k in tensors if k not in wanted], [k for k in wanted if k not in tensors]
        if foreign or missing:
            words = f"{foreign[0]} is not a weight of BERT" if foreign else f"{missing[0]} is missing"
            more = f" (nor are {len(foreign) - 1} more)" if len(foreign) > 1 else ""
            advice = "merge or remove its module, or use torch.save(model.state_dict())"
            raise WeightsError(f"{words}{more}: {advice}")
        del tensors[weights.POSITIONS]  # no file has them
        config = dataclasses.replace(config, **weights.sizes_of(tensors))
        with shapes_alone():
            weights.check_encoder(BertModel(config).state_dict(), tensors, "save_pretrained")
        try:
            fused.expect_counting(self, self.position_ids)
        except fused.NotExactError as found:
            raise WeightsError(f"save_pretrained: BertModel {found}, and no file can say so") from None
        return config, tensors

    # ---- The fused path ------------------------------------------------------------------------------------------

    def _hidden(self, input_ids: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
        """The last hidden state [B, S, H], fused where the modules are as they were built."""
        plan = self.plan()
        if plan.embedding is None or mask.requires_grad:  # the fused path has no gradient of masks
            return self.encode(self._embed(input_ids, types), mask)
        return passes.encode_rectangle(input_ids, mask, types, self.bert_layers, plan, self._recompute())

    def encode_packed(self, run: passes.Pass, batch: PackedBatch) -> Tensor:
        """The last hidden state of a packed batch [N, H], with weights and gradients as `run` says."""
        return self.encode_rows(run, PackedRows.of(batch))

    def encode_rows(self, run: passes.Pass, rows: PackedRows) -> Tensor:
        """The last hidden state [N, H] of packed token rows, with weights and gradients as `run` says.

        Raises ConfigError where `run` writes the gradients of embeddings that the fused path may not compute.
        """
        plan = self.plan()
        if plan.embedding is not None:
            hidden = run.embed((rows.tokens, rows.positions, rows.types), plan.embedding)
            return passes.through(run, rows, hidden, self.bert_layers, plan.layers)
        if run.owns_embeddings:
            advice = "the fast backend trains plain embeddings alone, use --backend reference"
            raise ConfigError(f"{plan.reasons[0]}: {advice}")
        ids, types = rows.rectangle(rows.tokens).long(), rows.rectangle(rows.types).long()
        return rows.rows(self.encode(self._embed(ids, types if types.any() else None), rows.mask()))

    def plan(self) -> fused.Plan:
        """The parts that the fused path computes; `plan().reasons` is empty where it computes everything."""
        if not torch.compiler.is_compiling():
            return self._plan()
        # A constant of the compiled graph, which itself guards what is read here: modules and activations.
        embedding, foreign = self._shape()
        layers = [
            None if names is None or layer.interm_af is not fused.GELU else layer_parts(layer, names)
            for layer, names in zip(self.bert_layers, foreign, strict=True)
        ]
        return fused.Plan(embedding_parts(self) if embedding else None, tuple(layers))

    @fused.constant_when_compiled
    def _shape(self) -> tuple[bool, tuple[tuple[str, ...] | None, ...]]:
        plan = self._plan()
        return plan.embedding is not None, tuple(None if layer is None else layer.foreign for layer in plan.layers)

    def _plan(self) -> fused.Plan:
        methods = (type(self).embed, type(self).encode, *_methods())
        extra = (fused.version(self.position_ids), *methods)
        plan = fused.plan(self, lambda: read_embedding(self), self.bert_layers, read_layer, extra)
        slower = [f"{reason}: this part runs as plain modules, which is slower" for reason in plan.reasons]
        fused.warn_once(self._warned, [*slower, *self._contradictions()], stacklevel=4)
        return plan

    def _contradictions(self) -> list[str]:
        """Fields of the configuration that were set after the model was built, and that its modules do not have."""
        if self.config == self._built:
            return []
        follows = {
            "num_hidden_layers": len(self.bert_layers),
            "vocab_size": getattr(self.word_embedding, "num_embeddings", None),
        }
        words = "changes nothing in a model that is built: set it before BertModel(config), or change the modules"
        said = []
        for name in BertConfig.__dataclass_fields__:
            built = getattr(self._built, name)
            value = getattr(self.config, name, built)  # another object may be in the configuration's place
            if name not in ("initializer_range", "name_or_path") and value not in (built, follows.get(name)):
                said.append(f"config.{name} = {value} {words}")
        return said

    def one_pass_parameters(self) -> list[nn.Parameter]:
        """Parameters whose per-task gradients the packed encoder writes itself, in the flat buffer's order.

        All but the word embedding (its gradient is row-sparse) and the pooler (ordinary autograd).
        """
        plan = self.plan()
        modules = () if plan.embedding is None else (plan.embedding.position, plan.embedding.type, plan.embedding.norm)
        parameters = [p for module in modules for p in module.parameters()]
        for layer, parts in zip(self.bert_layers, plan.layers, strict=True):
            parameters += layer.parameters() if parts is None else parts.parameters()
        return parameters


def embedding_parts(model: BertModel) -> fused.Embedding:
    """The modules that embed tokens."""
    tables = (model.word_embedding, model.pos_embedding, model.tk_type_embedding)
    return fused.Embedding(*tables, model.embed_layer_norm, model.embed_dropout)


def layer_parts(layer: Any, foreign: tuple[str, ...] = ()) -> fused.Layer:
    """The modules of a BertLayer."""
    attention = layer.self_attention
    return fused.Layer(
        attention.num_attention_heads, attention.query, attention.key, attention.value, attention.dropout,
        layer.attention_dense, layer.attention_dropout, layer.attention_layer_norm,
        layer.interm_dense, layer.out_dense, layer.out_dropout, layer.out_layer_norm, foreign,
    )  # fmt: skip


def read_embedding(model: BertModel) -> fused.Embedding:
    """The parts of the embeddings; raises fused.NotExactError where they are not as they were built."""
    for name in ("embed", "encode"):
        if getattr(type(model), name) is not _MODEL_METHODS[name] or name in vars(model):
            raise fused.NotExactError(model, f"has its own {name}")
    fused.expect_counting(model, model.position_ids)
    return fused.exact(embedding_parts(model))


def read_layer(layer: nn.Module) -> fused.Layer:
    """The parts of a layer; raises fused.NotExactError where it is not as it was built."""
    fused.expect(layer, BertLayer)
    assert isinstance(layer, BertLayer)
    fused.expect(layer.self_attention, BertSelfAttention)
    if _methods() != _AS_DEFINED:
        raise fused.NotExactError(layer, "has a class whose methods were replaced")
    if layer.interm_af is not fused.GELU:
        # Without its address, which would make a reason of its own for each layer's lambda.
        name = getattr(layer.interm_af, "__qualname__", repr(layer.interm_af))
        raise fused.NotExactError(layer, f"has another activation than gelu ({name:.60})")
    return fused.exact_layer(layer_parts(layer), layer.self_attention)


def _methods() -> tuple[object, ...]:
    """The methods of layers that the fused path replaces, as their classes have them now."""
    attention = (BertSelfAttention.forward, BertSelfAttention.transform, BertSelfAttention.attention)
    return (BertLayer.forward, BertLayer.add_norm, *attention)


_AS_DEFINED = _methods()
_MODEL_METHODS = {"embed": BertModel.embed, "encode": BertModel.encode}
