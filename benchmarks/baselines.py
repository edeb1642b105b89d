# SPDX-License-Identifier: Apache-2.0
"""Other ways to take the same training step, each at its best: what ours is measured against.

    padded      transformers' BertModel with SDPA, one padded batch a task, AdamW(fused), TorchJD for surgery
    compiled    the same under torch.compile, sentences padded to a few lengths (on CUDA with CUDA graphs)
    packed      one forward over packed tokens from PyTorch's own kernels, one backward a task, J J^T, AdamW(fused)

All use the heads, pooling, losses and dropout of the `MultitaskModel` that they are given.
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

from minbert_fast import reference, surgery
from minbert_fast.bert import BertModel
from minbert_fast.packing import MultitaskBatch, PackedBatch
from minbert_fast.tasks import MultitaskModel

LR = 1e-5
GRAIN = 32  # compiled: sentences are padded to multiples of it


class PaddedStep:
    """transformers' encoder over one rectangle a task; `grain` rounds its width up. bf16 through autocast."""

    def __init__(
        self, model: MultitaskModel, apart: bool, dtype: torch.dtype, grain: int = 1, compiled: bool = False
    ) -> None:
        self.model = model
        self.apart = apart
        self.dtype = dtype
        self.grain = grain
        encoder = as_transformers(model.encoder)
        model.encoder.to("meta")  # only the heads are used from here on: no memory for weights that stand idle
        self.shared = [p for p in encoder.parameters() if p.requires_grad]
        mode = "reduce-overhead" if self.shared[0].is_cuda else None
        self.encode: Callable[..., object] = torch.compile(encoder, mode=mode, dynamic=False) if compiled else encoder
        self.heads = model.head_parameters()
        self.optimizer = torch.optim.AdamW([*self.shared, *self.heads], lr=LR, weight_decay=0.0, fused=True)

    def __call__(self, batch: MultitaskBatch) -> Tensor:
        """One step; returns the losses [T]."""
        self.model.train()
        losses = [self._loss(name, one) for name, one in split_tasks(batch)]
        self.optimizer.zero_grad()
        if self.apart:
            self._operate(losses)
        else:
            torch.stack(losses).sum().backward()
        self.optimizer.step()
        return torch.stack([loss.detach() for loss in losses])

    def _loss(self, name: str, batch: MultitaskBatch) -> Tensor:
        packed = batch.packed
        width = -(-packed.max_seqlen // self.grain) * self.grain
        index, mask = rectangle(packed, width)
        ids = torch.where(mask, packed.tokens.long()[index], 0)
        device = packed.tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = self.encode(input_ids=ids, attention_mask=mask.long())[0]  # type: ignore[index]
        return self.model.losses(batch, hidden[mask].float())[name]

    def _operate(self, losses: list[Tensor]) -> None:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import backward, jac_to_grad

        torch.autograd.backward(losses, inputs=self.heads, retain_graph=True)
        backward(losses, inputs=self.shared, parallel_chunk_size=1)
        jac_to_grad(self.shared, PCGrad())


class PackedStep:
    """Packed tokens through torch's own linear, layer_norm, gelu and SDPA; one backward a task; G = J @ J.T."""

    def __init__(self, model: MultitaskModel, apart: bool, dtype: torch.dtype) -> None:
        self.model = model
        self.apart = apart
        self.dtype = dtype
        self.heads = model.head_parameters()
        self.shared = [p for n, p in model.encoder.named_parameters() if not n.startswith("pooler")]
        self.method = surgery.weights("pcgrad", "sum", torch.Generator().manual_seed(0))
        self.optimizer = torch.optim.AdamW([*self.shared, *self.heads], lr=LR, weight_decay=0.0, fused=True)

    def __call__(self, batch: MultitaskBatch) -> Tensor:
        """One step; returns the losses [T]."""
        self.model.train()
        device = batch.packed.tokens.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            hidden = packed_encoder(self.model.encoder, batch.packed)
        losses = list(self.model.losses(batch, hidden.float()).values())
        self.optimizer.zero_grad()
        if self.apart:
            self._operate(losses, device)
        else:
            torch.stack(losses).sum().backward()
        self.optimizer.step()
        return torch.stack([loss.detach() for loss in losses])

    def _operate(self, losses: list[Tensor], device: torch.device) -> None:
        J = torch.stack(reference.task_gradients(losses, self.shared))
        self.method.prepare(len(losses), device)
        reference.write_gradient(self.shared, self.method(J @ J.T) @ J)


def as_transformers(encoder: BertModel) -> nn.Module:
    """The same encoder as a transformers BertModel with SDPA attention, on the same device."""
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
    """For each place of [B, width] the packed row that belongs there (any row where there is none), and the mask."""
    begins, lengths = packed.cu_seqlens[:-1].long(), packed.cu_seqlens.diff()
    places = torch.arange(width, device=begins.device)
    mask = places < lengths[:, None]
    return torch.where(mask, begins[:, None] + places, 0), mask


def split_tasks(batch: MultitaskBatch) -> Iterator[tuple[str, MultitaskBatch]]:
    """Each task's part as a batch of its own, its sentences to be padded to their own longest."""
    packed = batch.packed
    bounds, offsets = packed.task_sentences.tolist(), packed.cu_seqlens.tolist()
    for name, (first, last) in zip(batch.tasks, itertools.pairwise(bounds), strict=True):
        begin, end = offsets[first], offsets[last]
        cu_seqlens = packed.cu_seqlens[first : last + 1] - begin
        part = replace(
            packed,
            tokens=packed.tokens[begin:end],
            cu_seqlens=cu_seqlens,
            max_seqlen=max(b - a for a, b in itertools.pairwise(offsets[first : last + 1])),
            num_tokens=end - begin,
            num_sentences=last - first,
        )
        labels = {name: batch.labels[name]}
        yield name, MultitaskBatch(part, (name,), {name: batch.arity[name]}, labels, {name: batch.rows[name]})


def packed_encoder(model: BertModel, packed: PackedBatch) -> Tensor:
    """The encoder over packed tokens [N, H], without padding outside attention."""
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
