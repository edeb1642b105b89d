# SPDX-License-Identifier: Apache-2.0
"""Baselines of the step benchmark: other implementations of the same training step, each tuned.

    naive       the reference backend: padded, eager, one backward per task, PCGrad's loop over whole gradients
    padded      transformers' BertModel with SDPA, one padded batch per task, AdamW(fused), TorchJD for surgery
    compiled    the same under torch.compile, sentences padded to a few lengths (on CUDA with CUDA graphs)
    packed      packed tokens through PyTorch's own kernels, one forward and one backward per task, J J^T, AdamW(fused)

All use the heads, pooling, losses and dropout of the given `MultitaskModel`, and the recipe's learning rate, betas and
epsilon. `prepare` makes the rectangles of a batch, as a data loader would: it is not part of the step, and not timed.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast import surgery as methods
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.bert import BertModel
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step import naive
from minbert_fast.tasks import ConsistencyLoss, MultitaskModel
from minbert_fast.tasks.base import TaskInput
from minbert_fast.tasks.model import pool_padded

GRAIN = 32  # compiled: pads sentences to multiples of 32 tokens


class Step(Protocol):
    """One way to take the training step."""

    def prepare(self, batch: MultitaskBatch) -> None:
        """Does what a data loader does for this batch, outside the clock."""

    def __call__(self, batch: MultitaskBatch) -> Tensor:
        """Takes one step on a prepared batch; returns the losses [T]."""

    def parameters(self) -> dict[str, Tensor]:
        """The model's parameters now, by our names."""


@dataclass(frozen=True)
class Rectangle:
    """Sentences of one task, padded: B sentences of at most S tokens, n tokens in all."""

    batch: MultitaskBatch  # the task's part of the packed batch
    ids: Tensor  # int64 [B, S]
    types: Tensor  # int64 [B, S]
    mask: Tensor  # int64 [B, S]: 1 for tokens
    packed: Tensor  # int64 [B, S]: the packed row of each position; 0 for padding
    padded: Tensor  # int64 [n]: the position, counted through the rectangle, of each packed row


class NaiveStep(naive.ReferenceStep):
    """The reference backend's step, fed with rectangles that were padded outside the clock."""

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype) -> None:
        super().__init__(model, recipe, dtype)
        self._prepared: dict[int, list[tuple[str, list[Rectangle]]]] = {}

    def prepare(self, batch: MultitaskBatch) -> None:
        columns = []
        for name, one in split_tasks(batch):  # a column of sentences is one call of the encoder
            n, arity = one.num_examples(name), one.arity[name]
            parts = [part_of(one, name, c * n, (c + 1) * n) for c in range(arity)]
            columns.append((name, [rectangle_of(part) for part in parts]))
        self._prepared[id(batch)] = columns

    def __call__(self, batch: MultitaskBatch, lr_scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().__call__(batch, lr_scale).losses

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def _losses(self, batch: MultitaskBatch, consistency: ConsistencyLoss | None) -> Tensor:
        losses = []
        encoder, device = self.model.encoder, batch.packed.tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for name, columns in self._prepared[id(batch)]:
                embeddings = []
                for made in columns:
                    hidden = encoder.stock(made.ids, made.mask, made.types)
                    embeddings.append(pool_padded(hidden, made.mask, self.model.pooling, encoder).float())
                packed = columns[0].batch.packed
                inputs = TaskInput(
                    embeddings=tuple(embeddings),
                    hidden=hidden[:0, 0],  # the benchmark's heads look at no tokens
                    cu_seqlens=packed.cu_seqlens,
                    max_seqlen=packed.max_seqlen,
                    first=0,
                    labels=batch.labels.get(name),
                )
                losses.append(self.model.loss(name, self.model.head(name)(inputs), batch, consistency))
        return torch.stack(losses)


class _PerTaskStep:
    """One forward and one backward per task, then surgery (if the recipe has it) on J [T, P], and fused AdamW."""

    own_gradients = False  # allocate `.grad` once and keep it, so that the tasks' gradients are added to our memory
    grain = 1  # sentences are padded to a multiple of it

    def __init__(self, model: MultitaskModel, shared: list[nn.Parameter], recipe: Recipe, dtype: torch.dtype) -> None:
        self.model = model
        self.shared = shared
        self.heads = model.head_parameters()
        self.surgery = recipe.surgery.method != "none"
        self.dtype = dtype
        o = recipe.optimizer
        parameters = [*shared, *self.heads]
        self.optimizer = torch.optim.AdamW(parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=0.0, fused=True)
        self._prepared: dict[int, list[tuple[str, Rectangle]]] = {}

    def prepare(self, batch: MultitaskBatch) -> None:
        self._prepared[id(batch)] = [(name, rectangle_of(one, self.grain)) for name, one in split_tasks(batch)]

    def __call__(self, batch: MultitaskBatch) -> Tensor:
        self.model.train()
        losses = []
        prepared = self._prepared[id(batch)]
        J = self.shared[0].new_empty(len(prepared) * self.surgery, sum(p.numel() for p in self.shared))
        for task, (name, made) in enumerate(prepared):
            loss = self._loss(name, made)
            losses.append(loss.detach())
            if self.surgery:
                torch.autograd.backward(loss, inputs=[*self.shared, *self._own(name)])
                torch.cat([_gradient(p).flatten() for p in self.shared], out=J[task])
                for p in self.shared:
                    p.grad = None
            else:
                loss.backward()
        if self.surgery:
            naive.write_gradient(self.shared, self._combine(J))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.own_gradients)  # at once: other candidates need the memory
        return torch.stack(losses)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def _own(self, name: str) -> list[nn.Parameter]:
        return self.model.head_parameters([name])

    def _loss(self, name: str, made: Rectangle) -> Tensor:
        device = made.ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self._hidden(made)
        return self.model.losses(made.batch, hidden.float())[name]

    def _hidden(self, made: Rectangle) -> Tensor:
        """The encoder's output [N, H] for the N packed tokens of a task."""
        raise NotImplementedError

    def _combine(self, J: Tensor) -> Tensor:
        """The gradient [P] that PCGrad makes of J [T, P]."""
        raise NotImplementedError


class PaddedStep(_PerTaskStep):
    """transformers' encoder over one padded batch per task, its width a multiple of `grain`; TorchJD's PCGrad."""

    def __init__(
        self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype, grain: int = 1, compiled: bool = False
    ) -> None:
        self.encoder = as_transformers(model.encoder)
        model.encoder.to("meta")  # frees the memory: only the heads are used from here on
        super().__init__(model, [p for p in self.encoder.parameters() if p.requires_grad], recipe, dtype)
        self.grain = grain
        self.encode: Callable[..., object] = self.encoder
        if compiled:
            from torch._dynamo import config

            config.recompile_limit = 256  # of all sizes and models together; beyond it (8) they would run eagerly
            cuda = self.shared[0].is_cuda
            self.encode = torch.compile(self.encoder, mode="reduce-overhead" if cuda else None, dynamic=False)
            # The next task overwrites gradients in a CUDA graph's memory (pytorch/pytorch issue 169545).
            self.own_gradients = cuda and not self.surgery
            for p in self.shared if self.own_gradients else ():
                p.grad = torch.zeros_like(p)

    def _hidden(self, made: Rectangle) -> Tensor:
        hidden: Tensor = self.encode(input_ids=made.ids, attention_mask=made.mask)[0]  # type: ignore[index]
        return hidden.flatten(0, 1)[made.padded]

    def _combine(self, J: Tensor) -> Tensor:
        from torchjd.aggregation import PCGrad

        combined: Tensor = PCGrad()(J)
        return combined

    def parameters(self) -> dict[str, Tensor]:
        heads: dict[str, Tensor] = {name: p for name, p in self.model.named_parameters() if not p.is_meta}
        with tempfile.TemporaryDirectory() as folder:
            self.encoder.save_pretrained(folder)  # type: ignore[operator]
            with warnings.catch_warnings(action="ignore"):  # there is no pooler
                ours = BertModel.from_pretrained(folder)
        return heads | {f"encoder.{name}": p for name, p in ours.named_parameters() if "pooler" not in name}


class PackedStep(_PerTaskStep):
    """Packed tokens through torch's linear, layer_norm, gelu and SDPA; PCGrad from G = J @ J.T."""

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype) -> None:
        shared = [p for n, p in model.encoder.named_parameters() if not n.startswith("pooler")]
        super().__init__(model, shared, recipe, dtype)
        self.method = methods.weights("pcgrad", "sum", torch.Generator().manual_seed(0))

    def _hidden(self, made: Rectangle) -> Tensor:
        return packed_encoder(self.model.encoder, made)

    def _combine(self, J: Tensor) -> Tensor:
        return self.method(J @ J.T) @ J


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def as_transformers(encoder: BertModel) -> nn.Module:
    """A transformers BertModel with SDPA attention and the same weights, on the same device."""
    from transformers import BertModel as Other
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        other: Any = Other.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False)
    module: nn.Module = other.to(next(encoder.parameters()).device).train()
    return module


def rectangle_of(batch: MultitaskBatch, grain: int = 1) -> Rectangle:
    """A task's sentences, padded to its longest sentence's length, rounded up to a multiple of `grain`."""
    packed = batch.packed
    width = -(-packed.max_seqlen // grain) * grain
    begins, lengths = packed.cu_seqlens[:-1].long(), packed.cu_seqlens.diff()
    mask = torch.arange(width, device=begins.device) < lengths[:, None]
    rows = torch.where(mask, begins[:, None] + torch.arange(width, device=begins.device), 0)
    ids, types = (torch.where(mask, column.long()[rows], 0) for column in (packed.tokens, packed.types))
    return Rectangle(batch, ids, types, mask.long(), rows, mask.flatten().nonzero()[:, 0])


def split_tasks(batch: MultitaskBatch) -> Iterator[tuple[str, MultitaskBatch]]:
    """Splits a batch into one batch per task, with that task's longest sentence as `max_seqlen`."""
    bounds = batch.packed.task_sentences.tolist()
    for name, (first, last) in zip(batch.tasks, itertools.pairwise(bounds), strict=True):
        yield name, part_of(batch, name, first, last)


def part_of(batch: MultitaskBatch, name: str, first: int, last: int) -> MultitaskBatch:
    """The sentences `first` to `last` of a batch, as a batch of task `name`."""
    packed = batch.packed
    offsets = packed.cu_seqlens[first : last + 1].tolist()
    begin, end = offsets[0], offsets[-1]
    part = replace(
        packed,
        tokens=packed.tokens[begin:end],
        positions=packed.positions[begin:end],
        types=packed.types[begin:end],
        cu_seqlens=packed.cu_seqlens[first : last + 1] - begin,
        max_seqlen=max(b - a for a, b in itertools.pairwise(offsets)),
        num_tokens=end - begin,
        num_sentences=last - first,
    )
    labels = {name: batch.labels[name]}
    return MultitaskBatch(part, (name,), {name: batch.arity[name]}, labels, {name: batch.rows[name]})


def packed_encoder(model: BertModel, made: Rectangle) -> Tensor:
    """The encoder's output [N, H]; pads inside attention only."""
    config, packed = model.config, made.batch.packed
    p, heads = config.hidden_dropout_prob if model.training else 0.0, config.num_attention_heads
    attended = made.mask.bool()[:, None, None]
    hidden: Tensor = model.word_embedding(packed.tokens.long()) + model.pos_embedding(packed.positions.long())
    hidden = F.dropout(model.embed_layer_norm(hidden + model.tk_type_embedding(packed.types.long())), p)
    layer: Any
    for layer in model.bert_layers:
        attend = layer.self_attention
        weight = torch.cat([attend.query.weight, attend.key.weight, attend.value.weight])
        bias = torch.cat([attend.query.bias, attend.key.bias, attend.value.bias])
        qkv = F.linear(hidden, weight, bias)[made.packed]  # [B, S, 3 H]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        context = F.scaled_dot_product_attention(
            q, k, v, attended, config.attention_probs_dropout_prob if model.training else 0.0,
            scale=1 / math.sqrt(q.shape[-1]),
        )  # fmt: skip
        rows = context.transpose(1, 2).flatten(2).flatten(0, 1)[made.padded]
        hidden = layer.attention_layer_norm(hidden + F.dropout(layer.attention_dense(rows), p))
        branch = layer.out_dense(F.gelu(layer.interm_dense(hidden)))
        hidden = layer.out_layer_norm(hidden + F.dropout(branch, p))
    return hidden
