# SPDX-License-Identifier: Apache-2.0
"""One pass through the encoder: where its weights come from, where their gradients go, and its dropout streams.

`AutogradPass` uses the parameters themselves and ordinary autograd (course code, fine-tuning by hand, inference).
`OnePass` uses the flat buffers and writes every parameter gradient apart by task into J. The encoder calls the same
methods on either. `PackedRows` and `DenseRows` say what rows there are and which of them attend to each other.

Shapes: N rows, B sentences, S positions, T tasks, H hidden, F intermediate, h heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast import ops
from minbert_fast.model.config import BertConfig
from minbert_fast.model.packing import PackedBatch

if TYPE_CHECKING:
    from minbert_fast.model.bert import BertModel

Attend = Callable[[Tensor], Tensor]  # qkv [N, 3, h, d] -> [N, h * d]


class Attention(Protocol):
    """Which rows attend to each other."""

    def attention(self, qkv: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
        """softmax(q k^T / sqrt(d)) v within each sentence: qkv [N, 3, h, d] -> [N, h * d]."""


class Rows(Attention, Protocol):
    """Token rows: indices [N] each, and attention among them."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def positions(self) -> Tensor: ...

    @property
    def types(self) -> Tensor: ...


@dataclass(frozen=True)
class PackedRows:
    """The rows of a packed batch."""

    batch: PackedBatch

    @property
    def tokens(self) -> Tensor:
        return self.batch.tokens

    @property
    def positions(self) -> Tensor:
        return self.batch.positions

    @property
    def types(self) -> Tensor:
        return self.batch.types

    def attention(self, qkv: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
        scale = 1.0 / math.sqrt(qkv.shape[-1])
        return ops.attention(qkv, self.batch.cu_seqlens, self.batch.max_seqlen, scale, p, seed, site)


@dataclass(frozen=True)
class DenseRows:
    """The rows of a rectangle [B, S] with padding anywhere: all of them, or, with `kept`, the attended ones alone."""

    tokens: Tensor
    positions: Tensor
    types: Tensor
    mask: Tensor  # [B, S] bool
    kept: Tensor | None  # [N] flat positions of the attended rows
    cu_seqlens: Tensor | None
    max_seqlen: int

    @classmethod
    def of(cls, input_ids: Tensor, mask: Tensor, types: Tensor, drop_padding: bool) -> DenseRows:
        """Rows of input_ids [B, S] under attention mask [B, S], with token types [B, S]."""
        length = input_ids.shape[1]
        attended = mask != 0
        positions = torch.arange(length, device=input_ids.device).expand_as(input_ids)
        types = types.expand_as(input_ids)
        if not drop_padding:
            tokens, places, kinds = (t.reshape(-1).int() for t in (input_ids, positions, types))
            return cls(tokens, places, kinds, attended, None, None, length)
        kept = attended.reshape(-1).nonzero().squeeze(1)
        lengths = attended.sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
        tokens, places, kinds = (t.reshape(-1)[kept].int() for t in (input_ids, positions, types))
        longest = int(lengths.max()) if lengths.numel() else 0
        return cls(tokens, places, kinds, attended, kept, cu_seqlens, longest)

    def attention(self, qkv: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
        scale = 1.0 / math.sqrt(qkv.shape[-1])
        if self.cu_seqlens is not None:
            return ops.attention(qkv, self.cu_seqlens, self.max_seqlen, scale, p, seed, site)
        rectangle = qkv.unflatten(0, self.mask.shape)  # [B, S, 3, h, d]
        return ops.attention_dense(rectangle, self.mask, scale, p, seed, site).flatten(0, 1)

    def rectangle(self, hidden: Tensor, length: int) -> Tensor:
        """Rows [N, H] as [B, length, H], zeros where the mask is 0 and beyond the rows' own width."""
        batch, width = self.mask.shape
        if self.kept is None:
            full = (hidden * self.mask.reshape(-1, 1).to(hidden.dtype)).unflatten(0, (batch, width))
        else:
            empty = hidden.new_zeros(batch * width, hidden.shape[-1])
            full = empty.index_copy(0, self.kept, hidden).unflatten(0, (batch, width))
        return full if width == length else F.pad(full, (0, 0, 0, length - width))


class Pass(Protocol):
    """What the encoder asks of a pass."""

    def linear(self, x: Tensor, *modules: nn.Linear) -> Tensor:
        """x [N, I] through one or several Linear modules side by side, biases included -> [N, sum of O]."""

    def product(self, x: Tensor, module: nn.Linear) -> Tensor:
        """x W^T [N, O]; the module's bias joins the op that follows."""

    def add_norm(self, x: Tensor, module: nn.Linear, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm(residual + dropout(x + the module's bias)) [N, H]."""

    def bias_gelu(self, x: Tensor, module: nn.Linear) -> Tensor:
        """GELU(x + the module's bias) [N, F]."""

    def embed(self, rows: Rows, model: BertModel) -> Tensor:
        """dropout(LayerNorm(word + position + type rows)) [N, H]."""

    def attend(self, rows: Attention) -> Attend:
        """Attention among `rows`, with its own dropout stream."""

    def enter(self, layer: int, hidden: Tensor) -> None:
        """`hidden` [N, H] is about to enter layer number `layer`."""


class Dropout:
    """Dropout probabilities and streams of one pass: each call site has its number, in the order of the forward."""

    def __init__(self, config: BertConfig, training: bool) -> None:
        self.hidden_p = config.hidden_dropout_prob if training else 0.0
        self.attention_p = config.attention_probs_dropout_prob if training else 0.0
        self.sites = 0  # how many there were so far

    def site(self) -> int:
        self.sites += 1
        return self.sites


class AutogradPass(Dropout):
    """Parameters as they are (cast under autocast), gradients to `.grad`, dropout seeded by torch's own generator."""

    def __init__(self, config: BertConfig, training: bool) -> None:
        super().__init__(config, training)
        self._seed: Tensor | None = None

    def linear(self, x: Tensor, *modules: nn.Linear) -> Tensor:
        weight = torch.cat([m.weight for m in modules]) if len(modules) > 1 else modules[0].weight
        bias = torch.cat([m.bias for m in modules]) if len(modules) > 1 else modules[0].bias
        dtype = _product_dtype(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))

    def product(self, x: Tensor, module: nn.Linear) -> Tensor:
        dtype = _product_dtype(x, module.weight)
        return F.linear(x.to(dtype), module.weight.to(dtype))

    def add_norm(self, x: Tensor, module: nn.Linear, residual: Tensor, norm: nn.LayerNorm) -> Tensor:
        bias, gamma, beta = (t.to(x.dtype) for t in (module.bias, norm.weight, norm.bias))
        seed = self._seed_on(x.device) if self.hidden_p else None
        return ops.add_norm(x, bias, residual.to(x.dtype), gamma, beta, norm.eps, self.hidden_p, seed, self.site())

    def bias_gelu(self, x: Tensor, module: nn.Linear) -> Tensor:
        return ops.bias_gelu(x, module.bias.to(x.dtype))

    def embed(self, rows: Rows, model: BertModel) -> Tensor:
        tables = (model.word_embedding.weight, model.pos_embedding.weight, model.tk_type_embedding.weight)
        norm = model.embed_layer_norm
        seed = self._seed_on(rows.tokens.device) if self.hidden_p else None
        return ops.embedding(
            rows.tokens, rows.positions, rows.types, *tables, norm.weight, norm.bias, norm.eps,
            self.hidden_p, seed, self.site(),
        )  # fmt: skip

    def attend(self, rows: Attention) -> Attend:
        site = self.site()

        def attention(qkv: Tensor) -> Tensor:
            seed = self._seed_on(qkv.device) if self.attention_p else None
            return rows.attention(qkv, self.attention_p, seed, site)

        return attention

    def enter(self, layer: int, hidden: Tensor) -> None: ...

    def _seed_on(self, device: torch.device) -> Tensor:
        if self._seed is None:
            self._seed = torch.randint(2**62, (1,), device=device)
        return self._seed


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product: autocast's where it is on, else the weight's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
