# SPDX-License-Identifier: Apache-2.0
"""embedding: word + position + type, LayerNorm, dropout; the backward with row-sparse word gradients by task.

Bytes, e an element: forward reads a word row and writes y, 2 e N H (the small tables stay in cache). Backward reads
dy and the word rows, writes and reads dz, 4 e N H, and writes dword 4 T U H and dposition 4 T S H.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Candidate
from benchmarks.kernels.case import DTYPES, EPS, TASKS, Case, P, backward_of, close, draw, label
from minbert_fast.model.packing import PackedBatch, pack
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.embedding import EmbeddingSink, embedding, embedding_forward, reference

VOCABULARY, POSITIONS, TYPES = 30522, 512, 2
SIZES = {"cpu": [(160, 384), (160, 768)], "cuda": [(160, 384), (160, 768), (1900, 768)]}  # sentences, hidden size


def cases(device: torch.device) -> Iterator[Case]:
    seed = torch.tensor([1], device=device)
    for sentences, width in SIZES[device.type]:
        batch = _batch(sentences).to(device)
        for dtype in DTYPES:
            sizes = ((VOCABULARY, width), (POSITIONS, width), (TYPES, width), (width,), (width,))
            parameters = [draw(*size, dtype=dtype, device=device) for size in sizes]
            yield _forward(batch, parameters, seed)
            yield _backward(batch, parameters, seed)


def _batch(sentences: int) -> PackedBatch:
    """Sentences of about 17 tokens, words by Zipf's law, [CLS] first: three tasks in the ratio 1 : 2 : 2."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.7, 0.5, sentences), 3, 120).astype(int)
    words = [np.minimum(rng.zipf(1.2, n) + 1000, VOCABULARY - 1) for n in lengths]
    for sentence in words:
        sentence[0] = 101
    first, second = sentences // 5, 3 * sentences // 5
    return pack([words[:first], words[first:second], words[second:]])


def _eager(batch: PackedBatch, word: Tensor, position: Tensor, type_: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    total = F.embedding(batch.tokens, word) + F.embedding(batch.positions, position) + F.embedding(batch.types, type_)
    return F.dropout(F.layer_norm(total, gamma.shape, gamma, beta, EPS), P)


def _exact(batch: PackedBatch, parameters: list[Tensor], seed: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y in fp32, with the dropout of ours, and the leaves of its graph."""
    leaves = [t.float().requires_grad_() for t in parameters]
    word, position, type_, gamma, beta = leaves
    keep = keep_mask(seed, 0, torch.arange(len(batch.tokens), device=word.device), word.shape[1], P)
    index = (batch.tokens, batch.positions, batch.types)
    return reference(*index, word, position, type_, gamma, beta, EPS, keep), leaves


def _forward(batch: PackedBatch, parameters: list[Tensor], seed: Tensor) -> Case:
    rows, width, dtype = len(batch.tokens), parameters[0].shape[1], parameters[0].dtype

    def ours() -> Tensor:
        y, _, _ = embedding_forward(batch.tokens, batch.positions, batch.types, *parameters, EPS, P, seed, 0)
        result: Tensor = y
        return result

    def check() -> None:
        close("y", ours(), _exact(batch, parameters, seed)[0].detach(), dtype)

    moved = 2 * dtype.itemsize * rows * width
    return Case(
        label("embedding forward", dtype, rows, width),
        {
            "ours": Candidate(ours, check, moved),
            "eager": Candidate(lambda: _eager(batch, *parameters), None, moved),
        },
    )


def _backward(batch: PackedBatch, parameters: list[Tensor], seed: Tensor) -> Case:
    word, position, type_, gamma, beta = parameters
    rows, distinct, width, dtype, device = len(batch.tokens), batch.num_words, word.shape[1], word.dtype, word.device
    dy = draw(rows, width, dtype=dtype, device=device)
    small = torch.empty(2, TASKS, width, device=device)
    d_type_table, dposition, dword = (torch.empty(TASKS, n, width, device=device) for n in (TYPES, POSITIONS, distinct))
    rows_of = (batch.task_tokens, batch.cu_seqlens, batch.word_order, batch.word_offsets[: distinct + 1])
    sink = EmbeddingSink(*rows_of, dword, dposition, d_type_table, *small)
    index = (batch.tokens, batch.positions, batch.types)
    output = embedding(*index, word, position, type_, gamma, beta, EPS, P, seed, 0, sink)

    def ours() -> None:
        output.backward(dy, retain_graph=True)

    def check() -> None:
        y, leaves = _exact(batch, parameters, seed)
        word, *others = torch.autograd.grad(y, leaves, dy.float())
        ours()
        close("dword", dword.sum(0), word[batch.word_ids[:distinct].long()], dtype)
        actual = (dposition, d_type_table, *small)
        for name, got, wanted in zip(("dposition", "d_type_table", "dgamma", "dbeta"), actual, others, strict=True):
            close(name, got.sum(0), wanted, dtype)

    moved = 4 * dtype.itemsize * rows * width + 4 * (dword.numel() + dposition.numel())
    leaves = [t.clone().requires_grad_() for t in parameters]
    return Case(
        label("embedding backward", dtype, rows, width),
        {
            "ours": Candidate(ours, check, moved),
            "eager, tasks summed, dense": Candidate(backward_of(_eager(batch, *leaves), leaves, dy), None, moved),
        },
    )
