# SPDX-License-Identifier: Apache-2.0
"""y = dropout(LayerNorm(word[tokens] + position[positions] + type[types])): how a sentence enters the encoder.

Shapes: N token rows, V words, S positions, K types, H hidden, T tasks, U distinct words of a batch. Statistics are fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minbert_fast.ops import dropout, native, segments
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import custom_op, kernel_op


def reference(
    tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
    gamma: Tensor, beta: Tensor, eps: float, keep: Tensor | float = 1.0,
) -> Tensor:  # fmt: skip
    """The op in plain PyTorch; `keep` [N, H] is the dropout factor of each element, 0 or 1 / (1 - p)."""
    total = F.embedding(tokens, word) + F.embedding(positions, position) + F.embedding(types, type_)
    return F.layer_norm(total, gamma.shape, gamma, beta, eps) * keep


class EmbeddingSink(NamedTuple):
    """Where the backward writes each task's parameter gradients, and how it finds a word's and a position's rows.

    The rows are those of a PackedBatch: in each sentence, positions count from 0. None for a frozen parameter.
    """

    bounds: Tensor  # [T + 1] int32, token rows of the tasks
    cu_seqlens: Tensor  # [B + 1] int32, token rows of the sentences
    word_order: Tensor  # [N] int32, token rows sorted by (word id, row)
    word_offsets: Tensor  # [U + 1] int32, where each distinct word's rows begin in word_order
    dword: Tensor | None = None  # [T, U, H] by distinct word, any task stride; overwritten, as those below
    dposition: Tensor | None = None  # [T, S, H]
    d_type_table: Tensor | None = None  # [T, K, H]
    dgamma: Tensor | None = None  # [T, H]
    dbeta: Tensor | None = None  # [T, H]
    padding: int = -1  # the word whose gradient is 0 for every task, as in nn.Embedding; -1: none

    @property
    def gradients(self) -> tuple[Tensor | None, ...]:
        return self[4:9]


def embedding(
    tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
    gamma: Tensor, beta: Tensor, eps: float,
    p: float = 0.0, seed: Tensor | None = None, site: int = 0, into: EmbeddingSink | None = None,
) -> Tensor:  # fmt: skip
    """Rows [N, H] of the summed embeddings, normalised, with dropout.

    tokens, positions, types int32 [N]; word [V, H], position [S, H], type_ [K, H] of one dtype; gamma, beta [H] of that
    dtype or fp32. Dropout with probability p draws from (seed int64 [1], site). Differentiable once in all five. With
    `into`, parameters are constants for autograd, and each task's gradients of them go into the sink. Rows from bounds[T]
    on add to none.

    Raises ValueError if shapes or dtypes disagree, p is not in [0, 1), or p > 0 has no seed.
    """
    width = word.shape[-1]
    for name, table in (("position", position), ("type_", type_)):
        segments.expect(name, table, (table.shape[0], width), word.dtype)
    for name, vector in (("gamma", gamma), ("beta", beta)):
        segments.expect(name, vector, (width,))
    for name, index in (("tokens", tokens), ("positions", positions), ("types", types)):
        segments.expect(name, index, (tokens.numel(),), torch.int32)
    dropout.check(p, seed)
    arguments = (tokens, positions, types, word, position, type_, gamma, beta, eps, p, seed, site, into)
    if implementation(word) == "torch":
        return _plain(*arguments)
    return _Embedding.apply(*arguments, None if into is None else segments.anchor(word.device))


def _plain(
    tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
    gamma: Tensor, beta: Tensor, eps: float, p: float, seed: Tensor | None, site: int, into: EmbeddingSink | None,
) -> Tensor:  # fmt: skip
    def formula(tokens: Tensor, positions: Tensor, types: Tensor, keep: Tensor, *parameters: Tensor) -> Tensor:
        word, position, type_, gamma, beta = (t.to(keep.dtype) for t in parameters)
        return reference(tokens, positions, types, word, position, type_, gamma, beta, eps, keep)

    rows = (tokens, positions, types, dropout.keep_rows(seed, site, len(tokens), word, p))
    parameters = (word, position, type_, gamma, beta)
    if into is None:
        return formula(*rows, *parameters).to(word.dtype)
    stores = [segments.store_in(view) for view in into.gradients]
    if into.dword is not None:
        stores[0] = _touched_rows(into.dword, into, tokens)
    return segments.by_task(formula, rows, parameters, into.bounds, stores).to(word.dtype)


def _touched_rows(dword: Tensor, into: EmbeddingSink, tokens: Tensor) -> segments.Store:
    """Writes the gradient [V, H] of each distinct word of the batch to dword[task]; zeros for words without rows."""
    words = _words(tokens, into.word_order, into.word_offsets)
    used = (into.word_offsets.diff() > 0) & (words != into.padding)
    return lambda task, gradient: dword[task].copy_(gradient[words] * used[:, None])


def _words(tokens: Tensor, word_order: Tensor, word_offsets: Tensor) -> Tensor:
    """The distinct words [U] of N > 0 tokens; any word for one without rows."""
    return tokens[word_order[word_offsets[:-1].clamp(max=len(tokens) - 1)]]


@kernel_op()
def embedding_forward(
    tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
    gamma: Tensor, beta: Tensor, eps: float, p: float, seed: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y [N, H], mean [N], rstd [N]."""
    statistics = word.new_empty(tokens.shape[0], dtype=torch.float32)
    return word.new_empty(tokens.shape[0], word.shape[1]), statistics, torch.empty_like(statistics)


@custom_op("embedding_backward", mutates_args=("dword", "dposition", "d_type_table", "dgamma", "dbeta"))
def embedding_backward(
    dy: Tensor, tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
    gamma: Tensor, mean: Tensor, rstd: Tensor, bounds: Tensor, cu_seqlens: Tensor, word_order: Tensor,
    word_offsets: Tensor, p: float, seed: Tensor | None, site: int, dword: Tensor | None, dposition: Tensor | None,
    d_type_table: Tensor | None, dgamma: Tensor | None, dbeta: Tensor | None, padding: int,
) -> None:  # fmt: skip
    """Writes each task's gradients, as EmbeddingSink says."""
    read = (dy, tokens, positions, types, word, position, type_, gamma, mean, rstd)
    rows = (bounds, cu_seqlens, word_order, word_offsets)
    written = (dword, dposition, d_type_table, dgamma, dbeta)
    arguments = (*(t.contiguous() for t in (*read, *rows)), p, seed, site, *written)
    if implementation(dy) == "triton":
        from minbert_fast.kernels import embedding as kernels

        kernels.embedding_backward(*arguments, padding)
        return
    native.call("embedding_backward", *arguments)
    if padding >= 0 and dword is not None and len(tokens):
        dword.masked_fill_((_words(tokens, word_order, word_offsets) == padding)[:, None], 0.0)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
        gamma: Tensor, beta: Tensor, eps: float, p: float, seed: Tensor | None, site: int,
        into: EmbeddingSink | None, anchor: Tensor | None,
    ) -> Tensor:  # fmt: skip
        inputs = (tokens, positions, types, word, position, type_, gamma)
        y, mean, rstd = embedding_forward(*inputs, beta, eps, p, seed, site)
        ctx.p, ctx.site, ctx.into, ctx.beta_dtype = p, site, into, beta.dtype
        ctx.save_for_backward(*inputs, mean, rstd, seed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, seed = ctx.saved_tensors
        if ctx.into:
            into = ctx.into
            embedding_backward(dy, *saved, *into[:4], ctx.p, seed, ctx.site, *into.gradients, into.padding)
            return (None,) * 14
        *gradients, dbeta = _dense_backward(dy, ctx.p, seed, ctx.site, *saved)
        return None, None, None, *gradients, dbeta.to(ctx.beta_dtype), *(None,) * 6


def _dense_backward(
    dy: Tensor, p: float, seed: Tensor | None, site: int, tokens: Tensor, positions: Tensor, types: Tensor,
    word: Tensor, position: Tensor, type_: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Dense gradients of the tables, and those of gamma and beta, in plain PyTorch (deterministic: it sorts the rows)."""
    keep = dropout.keep_rows(seed, site, len(tokens), word, p)
    lookups = ((word, tokens), (position, positions), (type_, types))
    z = sum(table[index].to(keep.dtype) for table, index in lookups)
    gamma_ = gamma.to(keep.dtype)
    dz, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dy.to(keep.dtype) * keep, z, gamma.shape, mean[:, None], rstd[:, None], gamma_, gamma_, [True] * 3
    )
    rounded = dz.to(word.dtype).to(dz.dtype)
    dword, dposition = (
        torch.ops.aten.embedding_dense_backward(rounded, index, table.shape[0], -1, False).to(table.dtype)
        for table, index in lookups[:2]
    )
    # A type has thousands of rows. index_add_ would add them on a GPU by atomics, in another order each time.
    by_type = [dz.where((types == kind)[:, None], 0.0).sum(0) for kind in range(len(type_))]
    d_type_table = torch.stack(by_type).to(type_.dtype)
    return dword, dposition, d_type_table, dgamma.to(gamma.dtype), dbeta
