# SPDX-License-Identifier: Apache-2.0
"""Baselines of the step benchmark: other implementations of the same training step, each tuned.

    padded      transformers' BertModel with SDPA, one padded batch per task, AdamW(fused), TorchJD for surgery
    compiled    the same under torch.compile, sentences padded to a few lengths (on CUDA with CUDA graphs)
    packed      packed tokens through PyTorch's own kernels, one forward and one backward per task, J J^T, AdamW(fused)

All use the heads, pooling, losses and dropout of the given `MultitaskModel`.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast import surgery as methods
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.model.bert import BertModel
from minbert_fast.model.packing import PackedBatch
from minbert_fast.step import naive
from minbert_fast.tasks import MultitaskModel

LR = 1e-5
GRAIN = 32  # compiled: pads sentences to multiples of 32 tokens


class _PerTaskStep:
    """One forward and one backward per task, then surgery (if `surgery`) on J [T, P], and fused AdamW."""

    own_gradients = False  # allocate `.grad` once and keep it, so that the tasks' gradients are added to our memory

    def __init__(self, model: MultitaskModel, shared: list[nn.Parameter], surgery: bool, dtype: torch.dtype) -> None:
        self.model = model
        self.shared = shared
        self.heads = model.head_parameters()
        self.surgery = surgery
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW([*shared, *self.heads], lr=LR, weight_decay=0.0, fused=True)

    def __call__(self, batch: MultitaskBatch) -> Tensor:
        """Takes one step; returns the losses [T]."""
        self.model.train()
        losses, rows = [], []
        for name, one in split_tasks(batch):
            loss = self._loss(name, one)
            losses.append(loss.detach())
            if self.surgery:
                torch.autograd.backward(loss, inputs=[*self.shared, *self._own(name)])
                rows.append(torch.cat([_gradient(p).flatten() for p in self.shared]))
                for p in self.shared:
                    p.grad = None
            else:
                loss.backward()
        if self.surgery:
            naive.write_gradient(self.shared, self._combine(torch.stack(rows)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.own_gradients)  # at once: other candidates need the memory
        return torch.stack(losses)

    def _own(self, name: str) -> list[nn.Parameter]:
        return self.model.head_parameters([name])

    def _loss(self, name: str, batch: MultitaskBatch) -> Tensor:
        with torch.autocast(batch.packed.tokens.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self._hidden(batch.packed)
        return self.model.losses(batch, hidden.float())[name]

    def _hidden(self, packed: PackedBatch) -> Tensor:
        """The encoder's output [N, H] for the N packed tokens."""
        raise NotImplementedError

    def _combine(self, J: Tensor) -> Tensor:
        """The gradient [P] that PCGrad makes of J [T, P]."""
        raise NotImplementedError


class PaddedStep(_PerTaskStep):
    """transformers' encoder over one padded batch per task, its width a multiple of `grain`; TorchJD's PCGrad."""

    def __init__(
        self, model: MultitaskModel, surgery: bool, dtype: torch.dtype, grain: int = 1, compiled: bool = False
    ) -> None:
        encoder = as_transformers(model.encoder)
        model.encoder.to("meta")  # frees the memory: only the heads are used from here on
        super().__init__(model, [p for p in encoder.parameters() if p.requires_grad], surgery, dtype)
        self.grain = grain
        self.encode: Callable[..., object] = encoder
        if compiled:
            from torch._dynamo import config

            config.recompile_limit = (
                256  # all sizes and models count together; beyond the limit of 8 they would run eagerly
            )
            cuda = self.shared[0].is_cuda
            self.encode = torch.compile(encoder, mode="reduce-overhead" if cuda else None, dynamic=False)
            # The next task overwrites gradients in a CUDA graph's memory (pytorch/pytorch issue 169545).
            self.own_gradients = cuda and not surgery
            for p in self.shared if self.own_gradients else ():
                p.grad = torch.zeros_like(p)

    def _hidden(self, packed: PackedBatch) -> Tensor:
        width = -(-packed.max_seqlen // self.grain) * self.grain
        index, mask = rectangle(packed, width)
        ids = torch.where(mask, packed.tokens.long()[index], 0)
        hidden: Tensor = self.encode(input_ids=ids, attention_mask=mask.long())[0]  # type: ignore[index]
        return hidden[mask]

    def _combine(self, J: Tensor) -> Tensor:
        from torchjd.aggregation import PCGrad

        combined: Tensor = PCGrad()(J)
        return combined


class PackedStep(_PerTaskStep):
    """Packed tokens through torch's linear, layer_norm, gelu and SDPA; PCGrad from G = J @ J.T."""

    def __init__(self, model: MultitaskModel, surgery: bool, dtype: torch.dtype) -> None:
        shared = [p for n, p in model.encoder.named_parameters() if not n.startswith("pooler")]
        super().__init__(model, shared, surgery, dtype)
        self.method = methods.weights("pcgrad", "sum", torch.Generator().manual_seed(0))

    def _hidden(self, packed: PackedBatch) -> Tensor:
        return packed_encoder(self.model.encoder, packed)

    def _combine(self, J: Tensor) -> Tensor:
        self.method.prepare(len(J), J.device)
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


def rectangle(packed: PackedBatch, width: int) -> tuple[Tensor, Tensor]:
    """Index [B, width] of the packed row of each padded position, and the mask of real tokens [B, width]."""
    begins, lengths = packed.cu_seqlens[:-1].long(), packed.cu_seqlens.diff()
    places = torch.arange(width, device=begins.device)
    mask = places < lengths[:, None]
    return torch.where(mask, begins[:, None] + places, 0), mask


def split_tasks(batch: MultitaskBatch) -> Iterator[tuple[str, MultitaskBatch]]:
    """Splits a batch into one batch per task, with that task's longest sentence as `max_seqlen`."""
    packed = batch.packed
    bounds, offsets = packed.task_sentences.tolist(), packed.cu_seqlens.tolist()
    for name, (first, last) in zip(batch.tasks, itertools.pairwise(bounds), strict=True):
        begin, end = offsets[first], offsets[last]
        cu_seqlens = packed.cu_seqlens[first : last + 1] - begin
        part = replace(
            packed,
            tokens=packed.tokens[begin:end],
            positions=packed.positions[begin:end],
            types=packed.types[begin:end],
            cu_seqlens=cu_seqlens,
            max_seqlen=max(b - a for a, b in itertools.pairwise(offsets[first : last + 1])),
            num_tokens=end - begin,
            num_sentences=last - first,
        )
        labels = {name: batch.labels[name]}
        yield name, MultitaskBatch(part, (name,), {name: batch.arity[name]}, labels, {name: batch.rows[name]})


def packed_encoder(model: BertModel, packed: PackedBatch) -> Tensor:
    """The encoder's output [N, H]; pads inside attention only."""
    config = model.config
    p, heads = config.hidden_dropout_prob if model.training else 0.0, config.num_attention_heads
    index, mask = rectangle(packed, packed.max_seqlen)
    hidden: Tensor = model.word_embedding(packed.tokens.long()) + model.pos_embedding(packed.positions.long())
    hidden = F.dropout(model.embed_layer_norm(hidden + model.tk_type_embedding(packed.types.long())), p)
    layer: Any
    for layer in model.bert_layers:
        attend = layer.self_attention
        weight = torch.cat([attend.query.weight, attend.key.weight, attend.value.weight])
        bias = torch.cat([attend.query.bias, attend.key.bias, attend.value.bias])
        qkv = F.linear(hidden, weight, bias)[index]  # [B, S, 3 H]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        context = F.scaled_dot_product_attention(
            q, k, v, mask[:, None, None], config.attention_probs_dropout_prob if model.training else 0.0,
            scale=1 / math.sqrt(q.shape[-1]),
        )  # fmt: skip
        rows = context.transpose(1, 2).flatten(2)[mask]
        hidden = layer.attention_layer_norm(hidden + F.dropout(layer.attention_dense(rows), p))
        branch = layer.out_dense(F.gelu(layer.interm_dense(hidden)))
        hidden = layer.out_layer_norm(hidden + F.dropout(branch, p))
    return hidden
