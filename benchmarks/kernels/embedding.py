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
from benchmarks.kernels.case import EPS, TASKS, Case, P, backward_of, close, draw, dtypes, label
from minbert_fast.model.packing import PackedBatch, pack
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.embedding import EmbeddingSink, embedding, embedding_forward, reference

VOCABULARY, POSITIONS, TYPES = 30522, 512, 2
SIZES = {"cpu": [(160, 384), (160, 768)], "cuda": [(160, 384), (160, 768), (1900, 768)]}  # sentences, hidden size


def cases(device: torch.device) -> Iterator[Case]:
    for sentences, width in SIZES[device.type]:
        for dtype in dtypes(device):
            yield from _cases(_batch(sentences).to(device), width, dtype, device)


def _batch(sentences: int) -> PackedBatch:
    """Sentences of about 17 tokens, words by Zipf's law, [CLS] first: three tasks in the ratio 1 : 2 : 2."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.7, 0.5, sentences), 3, 120).astype(int)
    words = [np.minimum(rng.zipf(1.2, n) + 1000, VOCABULARY - 1) for n in lengths]
    for sentence in words:
        sentence[0] = 101
    first, second = sentences // 5, 3 * sentences // 5
    return pack([words[:first], words[first:second], words[second:]])


def _cases(batch: PackedBatch, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    rows, distinct = len(batch.tokens), batch.num_words
    index = (batch.tokens, batch.positions, batch.types)
    sizes = ((VOCABULARY, width), (POSITIONS, width), (TYPES, width), (width,), (width,))
    *tables, gamma, beta = parameters = [draw(*size, dtype=dtype, device=device) for size in sizes]
    dy = draw(rows, width, dtype=dtype, device=device)
    seed = torch.tensor([1], device=device)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = embedding_forward(*index, *tables, gamma, beta, EPS, P, seed, 0)
        return result

    def eager(word: Tensor, position: Tensor, type_: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        total = F.embedding(index[0], word) + F.embedding(index[1], position) + F.embedding(index[2], type_)
        return F.dropout(F.layer_norm(total, (width,), gamma, beta, EPS), P)

    def exact() -> tuple[Tensor, list[Tensor]]:
        leaves = [t.float().requires_grad_() for t in parameters]
        keep = keep_mask(seed, 0, torch.arange(rows, device=device), width, P)
        word, position, type_, scale, shift = leaves
        return reference(*index, word, position, type_, scale, shift, EPS, keep), leaves

    def check() -> None:
        close("y", ours()[0], exact()[0].detach(), dtype)

    moved = 2 * dy.element_size() * rows * width
    yield Case(
        label("embedding forward", dtype, rows, width),
        {
            "ours": Candidate(ours, check, moved),
            "eager": Candidate(lambda: eager(*parameters), None, moved),
        },
    )

    small = torch.empty(2, TASKS, width, device=device)
    dtype_, dposition, dword = (torch.empty(TASKS, n, width, device=device) for n in (TYPES, POSITIONS, distinct))
    rows_of = (batch.task_tokens, batch.cu_seqlens, batch.word_order, batch.word_offsets[: distinct + 1])
    sink = EmbeddingSink(*rows_of, dword, dposition, dtype_, *small)
    word, position, type_ = tables
    output = embedding(*index, word, position, type_, gamma, beta, EPS, P, seed, 0, sink)

    def ours_backward() -> None:
        output.backward(dy, retain_graph=True)

    def check_backward() -> None:
        y, leaves = exact()
        word, *others = torch.autograd.grad(y, leaves, dy.float())
        ours_backward()
        close("dword", dword.sum(0), word[batch.word_ids[:distinct].long()], dtype)
        actual = (dposition, dtype_, *small)
        for name, got, wanted in zip(("dposition", "dtype", "dgamma", "dbeta"), actual, others, strict=True):
            close(name, got.sum(0), wanted, dtype)

    moved = 4 * dy.element_size() * rows * width + 4 * (dword.numel() + dposition.numel())
    leaves = [t.clone().requires_grad_() for t in parameters]
    yield Case(
        label("embedding backward", dtype, rows, width),
        {
            "ours": Candidate(ours_backward, check_backward, moved),
            "eager, tasks summed, dense": Candidate(backward_of(eager(*leaves), leaves, dy), None, moved),
        },
    )
