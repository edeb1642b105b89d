# SPDX-License-Identifier: Apache-2.0
"""One fused pass through the encoder: where its weights come from, where their gradients go, and its dropout streams.

`Pass` is the base class. `AutogradPass` uses the parameters themselves and ordinary autograd (course code, fine-tuning by
hand). `OnePass` (step/flat_pass.py) uses the flat buffers and writes parameter gradients into J, one row per task.
`Snapshot` (snapshot.py) uses converted copies. `through` runs a stack of layers with any of them; it calls a layer that
the fused path may not compute as a module, on a padded rectangle.

Shapes: N rows, B sentences, S positions, T tasks, H hidden, F intermediate, h heads, d head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minbert_fast import ops
from minbert_fast.model.fused import Embedding, Layer, Plan
from minbert_fast.model.rows import DenseRows, Rows, TokenRows, extended_mask
from minbert_fast.ops import AddNormSink, BiasGeluSink, EmbeddingSink, backend
from minbert_fast.ops.segments import one_task

Sink = TypeVar("Sink")
Value = TypeVar("Value")
_INT32 = (torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)

# ---- Layers ----------------------------------------------------------------------------------------------------------


def fused_layer(layer: Layer, hidden: Tensor, residual: Tensor, run: Pass, rows: Rows) -> tuple[Tensor, Tensor]:
    """One BERT layer: hidden [N, H], and its other name for the residual connection (Pass.add_norm) -> the same two."""

    def product(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """x W^T, and the bias that the next op adds; a foreign module has added its own."""
        module: Any = getattr(layer, name)
        if name not in layer.foreign:
            return run.product(x, module), module.bias
        y = rows.rows(run.call(module, rows.rectangle(x)))
        return y, y.new_zeros(y.shape[-1])

    def projections() -> Tensor:
        modules: tuple[Any, ...] = (layer.query, layer.key, layer.value)
        if not layer.foreign:
            return run.linear(hidden, *modules)
        padded = rows.rectangle(hidden)
        pairs = zip(("query", "key", "value"), modules, strict=True)
        foreign = layer.foreign
        columns = [rows.rows(run.call(m, padded)) if name in foreign else run.linear(hidden, m) for name, m in pairs]
        return torch.cat(columns, -1)

    whole = run.whole_layer(layer, hidden, rows)
    if whole is not None:
        return whole, whole
    qkv = projections().unflatten(-1, (3, layer.heads, -1))  # [N, 3, h, d]
    context = run.attention(rows, qkv, layer.probability_dropout)  # [N, H]
    branch, bias = product(context, "attention_dense")  # [N, H]
    hidden, residual = run.add_norm(branch, bias, layer.attention_dropout, residual, layer.attention_norm)
    inner = run.bias_gelu(*product(hidden, "interm_dense"))  # [N, F]
    branch, bias = product(inner, "out_dense")  # [N, H]
    return run.add_norm(branch, bias, layer.out_dropout, residual, layer.out_norm)


def through(
    run: Pass,
    rows: Rows,
    hidden: Tensor,
    modules: Iterable[nn.Module],
    exact: Sequence[Layer | None],
    recompute: bool = False,
) -> Tensor:
    """hidden [N, H] through layers `modules` -> [N, H], fused where `exact` has the layer's parts.

    Any other layer is called as a module: layer(hidden_states [B, S, H], attention_mask [B, 1, 1, S]). With `recompute`,
    a layer keeps its input alone, and its backward computes the rest a second time, with the same dropout.
    """
    padded: Tensor | None = None  # hidden as a rectangle, while layers in a row are called as modules
    residual = hidden
    for number, (module, parts) in enumerate(zip(modules, exact, strict=True)):
        if parts is None:
            padded = rows.rectangle(hidden) if padded is None else padded
            run.enter(number, padded)
            mask = extended_mask(rows.mask(), padded.dtype)
            padded = computed(run.call, module, padded, mask, recompute=recompute)
        else:
            if padded is not None:
                hidden = residual = rows.rows(padded)
                padded = None
            run.enter(number, hidden)
            arguments = (run.sites, parts, hidden, residual, run, rows)
            hidden, residual = computed(_fused_layer_at, *arguments, recompute=recompute)
    return hidden if padded is None else rows.rows(padded)


def encode_rectangle(
    input_ids: Tensor, mask: Tensor, types: Tensor | None, modules: Iterable[nn.Module], plan: Plan, recompute: bool
) -> Tensor:
    """input_ids, mask, types (None: 0) [B, S] -> the last hidden state [B, S, H], by ordinary autograd; see `through`.

    It has the embeddings' dtype under autocast too, as in the stock model, whose last LayerNorm gives fp32.
    """
    assert plan.embedding is not None
    rows, run = DenseRows.of(mask), AutogradPass()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    kinds = torch.zeros_like(input_ids, dtype=torch.int32) if types is None else types.expand_as(input_ids)
    tokens = (_narrow(rows.rows(input_ids)), rows.rows(positions).int(), _narrow(rows.rows(kinds)))
    embedded = run.embed(tokens, plan.embedding)
    hidden = through(run, rows, embedded, modules, plan.layers, recompute)
    return rows.rectangle(hidden).to(embedded.dtype)


def _narrow(ids: Tensor) -> Tensor:
    """Ids as int32. One beyond int32 becomes its end, which no table has; it would otherwise become another word's."""
    if ids.dtype == torch.int64:
        ids = ids.clamp(*_INT32)
    return ids.int()


def _fused_layer_at(
    site: int, parts: Layer, hidden: Tensor, residual: Tensor, run: Pass, rows: Rows
) -> tuple[Tensor, Tensor]:
    """A fused layer whose dropout streams follow number `site`, so that a second run draws what the first drew."""
    run.sites = site
    return fused_layer(parts, hidden, residual, run, rows)


def computed(function: Callable[..., Value], *arguments: Any, recompute: bool) -> Value:
    """function(*arguments). With `recompute`, the backward computes it again instead of keeping its activations."""
    if not recompute:
        return function(*arguments)
    out: Value = checkpoint(function, *arguments, use_reentrant=False)
    return out


def called(module: nn.Module, hidden: Tensor, *more: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Calls a module: hidden [B, S, I] -> [B, S, O]; `weights` replace its parameters by name.

    The call is under autocast where half-precision `hidden` has another dtype than the module's parameters.
    """
    dtype = next((p.dtype for p in module.parameters()), hidden.dtype)
    cast = hidden.dtype in (torch.bfloat16, torch.float16) and dtype != hidden.dtype
    with torch.autocast(hidden.device.type, hidden.dtype) if cast else nullcontext():
        inputs = (hidden, *more)
        out: Tensor = module(*inputs) if weights is None else functional_call(module, dict(weights), inputs)
    return out.to(hidden.dtype)


# ---- Passes ----------------------------------------------------------------------------------------------------------


class Pass:
    """How a fused pass computes: its methods read the weights of the modules they get, and call only the foreign ones.

    Each call site of dropout has a number, in the order of the forward. The seed and the number name a random stream.
    """

    owns_embeddings = False  # True: the pass writes the gradients of the embeddings, so nothing else may embed
    sites = 0  # number of the last call site

    def weight(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values of a parameter, for an op whose activations have `dtype` (None: of an embedding)."""
        raise NotImplementedError

    def linear(self, x: Tensor, *modules: nn.Linear) -> Tensor:
        """x [N, I] through one or several Linear modules side by side, biases included -> [N, sum of O]."""
        raise NotImplementedError

    def product(self, x: Tensor, module: nn.Linear) -> Tensor:
        """x W^T [N, O]; the op that follows adds the module's bias."""
        raise NotImplementedError

    def seed_on(self, device: torch.device) -> Tensor:
        """The seed [1] int64 of every dropout of the pass."""
        raise NotImplementedError

    def table(self, module: nn.Embedding) -> Tensor:
        """The rows of an embedding [V, H]."""
        return self.weight(module.weight)

    def sink(self, kind: Callable[..., Sink], *parameters: Tensor) -> Sink | None:
        """Where an op's backward writes the gradients of its parameters; None: where autograd does."""
        return None

    def embedding_sink(self, parts: Embedding) -> EmbeddingSink | None:
        """The same for the embeddings."""
        return None

    def dropout(self, module: nn.Dropout, device: torch.device) -> tuple[float, Tensor | None, int]:
        """The present p of the module, the seed (None: p is 0), and the number of the call site."""
        self.sites += 1
        p = module.p if module.training else 0.0
        return p, self.seed_on(device) if p else None, self.sites

    def embed(self, tokens: TokenRows, parts: Embedding) -> Tensor:
        """dropout(LayerNorm(word + position + type rows)) [N, H]."""
        word, position, kind = (self.table(module) for module in (parts.word, parts.position, parts.type))
        gamma, beta = self.weight(parts.norm.weight), self.weight(parts.norm.bias)
        return ops.embedding(
            *tokens, word, position, kind, gamma, beta, parts.norm.eps, *self.dropout(parts.dropout, tokens[0].device),
            into=self.embedding_sink(parts),
        )  # fmt: skip

    def attention(self, rows: Rows, qkv: Tensor, dropout: nn.Dropout) -> Tensor:
        """softmax(q k^T / sqrt(d)) v within each sentence of `rows`: qkv [N, 3, h, d] -> [N, h * d]."""
        return rows.attention(qkv, 1.0 / math.sqrt(qkv.shape[-1]), *self.dropout(dropout, qkv.device))

    def add_norm(
        self, x: Tensor, bias: Tensor, dropout: nn.Dropout, residual: Tensor, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        """LayerNorm(residual + dropout(x + bias)) [N, H], for the next product and for the residual around it."""
        gamma, beta = self.weight(norm.weight, x.dtype), self.weight(norm.bias, x.dtype)
        return ops.add_norm_twice(
            x, self.weight(bias, x.dtype), residual.to(x.dtype), gamma, beta, norm.eps,
            *self.dropout(dropout, x.device), into=self.sink(AddNormSink, norm.weight, norm.bias, bias),
        )  # fmt: skip

    def bias_gelu(self, x: Tensor, bias: Tensor) -> Tensor:
        """GELU(x + bias) [N, F]."""
        return ops.bias_gelu(x, self.weight(bias, x.dtype), into=self.sink(BiasGeluSink, bias))

    def whole_layer(self, layer: Layer, hidden: Tensor, rows: Rows) -> Tensor | None:
        """A layer [N, H] in one go; None: its ops run one by one."""
        return None

    def call(self, module: nn.Module, hidden: Tensor, *more: Tensor) -> Tensor:
        """A module that the fused path may not compute: hidden [B, S, I] -> [B, S, O]; `more` [B, ...] goes along."""
        return called(module, hidden, *more)

    def enter(self, layer: int, hidden: Tensor) -> None:
        """`hidden` [N, H] is about to enter layer number `layer`."""


class AutogradPass(Pass):
    """Parameters as they are (cast under autocast), gradients to `.grad`, dropout seeded by torch's own generator."""

    def __init__(self) -> None:
        self._seed: Tensor | None = None
        self._bounds: dict[int, Tensor] = {}  # by number of rows: all of them as one task

    def weight(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return parameter.to(dtype or parameter.dtype)

    def linear(self, x: Tensor, *modules: nn.Linear) -> Tensor:
        weight = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
        bias = torch.cat([m.bias for m in modules]) if len(modules) > 1 else modules[0].bias
        return _product(x, weight, bias)

    def product(self, x: Tensor, module: nn.Linear) -> Tensor:
        return _product(x, module.weight)

    def embed(self, tokens: TokenRows, parts: Embedding) -> Tensor:
        """With torch's own dropout: autograd keeps its mask, while ours would be drawn again in plain PyTorch."""
        tables = [self.table(module) for module in (parts.word, parts.position, parts.type)]
        if len({table.dtype for table in tables}) > 1:
            dtype = functools.reduce(torch.promote_types, (table.dtype for table in tables))
            tables = [table.to(dtype) for table in tables]
        word, position, kind = tables
        rows = ops.embedding(*tokens, word, position, kind, parts.norm.weight, parts.norm.bias, parts.norm.eps)
        self.sites += 1
        return F.dropout(rows, parts.dropout.p, parts.dropout.training)

    def table(self, module: nn.Embedding) -> Tensor:
        """As in nn.Embedding, the row of `padding_idx` gets no gradient."""
        weight, row = module.weight, module.padding_idx
        if row is None or not (weight.requires_grad and torch.is_grad_enabled()):
            return weight
        if torch.compiler.is_compiling():  # the compiler fuses this; a hook would break its graph
            padding = torch.arange(module.num_embeddings, device=weight.device)[:, None] == row
            return torch.where(padding, weight.detach(), weight)

        def without_row(gradient: Tensor) -> Tensor:
            kept = gradient.clone()
            kept[row] = 0
            return kept

        view = weight.view_as(weight)
        view.register_hook(without_row)
        return view

    def whole_layer(self, layer: Layer, hidden: Tensor, rows: Rows) -> Tensor | None:
        if layer.foreign or torch.compiler.is_compiling():
            return None
        parts: Any = layer
        linears = (parts.query, parts.key, parts.value)
        dtype = _product_dtype(hidden, parts.query.weight)
        hidden = hidden.to(dtype)
        if backend.implementation(hidden) == "torch":
            return None
        weights = [m.weight for m in linears] + [m.bias for m in linears]
        for linear, norm in ((parts.attention_dense, layer.attention_norm), (parts.out_dense, layer.out_norm)):
            weights += [linear.weight, linear.bias, norm.weight, norm.bias]
        weights[10:10] = [parts.interm_dense.weight, parts.interm_dense.bias]
        modules = (layer.probability_dropout, layer.attention_dropout, layer.out_dropout)
        first, second, third = (self.dropout(module, hidden.device) for module in modules)
        count = hidden.shape[0]
        if count not in self._bounds:
            (self._bounds[count],) = one_task(hidden)
        settings = ops.LayerSettings(
            layer.heads, (layer.attention_norm.eps, layer.out_norm.eps),
            (first, second, third), rows.sentences(), self._bounds[count],
        )  # fmt: skip
        return ops.encoder_layer(hidden, ops.LayerWeights(*(w.to(dtype) for w in weights)), settings)

    def seed_on(self, device: torch.device) -> Tensor:
        if self._seed is None:
            self._seed = torch.randint(2**62, (1,), device=device)
        return self._seed


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T (+ b), in autocast's dtype where autocast is on, else in the weight's."""
    dtype = _product_dtype(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The weight's dtype, or autocast's, which leaves doubles as they are."""
    device = x.device.type
    chosen = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if chosen else weight.dtype
