# SPDX-License-Identifier: Apache-2.0
"""y = dropout(LayerNorm(word[tokens] + position[positions] + type[types])): how a sentence enters the encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minbert_fast.ops import segments
from minbert_fast.ops.add_norm import norm_backward
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native import layers


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
    dtype: Tensor | None = None  # [T, K, H]
    dgamma: Tensor | None = None  # [T, H]
    dbeta: Tensor | None = None  # [T, H]


def embedding(
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    into: EmbeddingSink | None = None,
) -> Tensor:
    """Rows [N, H] of the summed embeddings, normalised (statistics in fp32), with dropout.

    tokens, positions, types int32 [N]; word [V, H], position [S, H], type_ [K, H] of one dtype; gamma, beta [H] of that
    dtype or fp32. Dropout with probability p draws from (seed int64 [1], site). Differentiable once in all five. With
    `into`, parameters count as constants, their gradients go into the sink apart by task, and rows from bounds[T] on
    add to none.

    Raises ValueError where shapes or dtypes disagree, or p is no probability below 1 or has no seed.
    """
    width = word.shape[-1]
    for name, table in (("position", position), ("type_", type_)):
        if table.shape[1:] != (width,) or table.dtype != word.dtype:
            raise ValueError(
                f"{name} {table.dtype} {list(table.shape)} does not match word {word.dtype} {list(word.shape)}"
            )
    for name, vector in (("gamma", gamma), ("beta", beta)):
        if vector.shape != (width,):
            raise ValueError(f"{name} must have shape [{width}], not {list(vector.shape)}")
    for name, index in (("tokens", tokens), ("positions", positions), ("types", types)):
        if index.shape != tokens.shape or index.dim() != 1 or index.dtype != torch.int32:
            raise ValueError(f"{name} must be int32 [{tokens.shape[0]}], not {index.dtype} {list(index.shape)}")
    if not 0.0 <= p < 1.0 or (p > 0.0 and seed is None):
        raise ValueError(f"dropout needs 0 <= p < 1 and, where p > 0, a seed: p is {p}, seed is {seed}")
    arguments = (tokens, positions, types, word, position, type_, gamma, beta, eps, p, seed, site)
    if into is not None:
        return _EmbeddingInto.apply(*arguments, into, segments.anchor(word.device))
    y: Tensor = _forward(*arguments)[0]
    return y


@custom_op("embedding", mutates_args=())
def _forward(
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, H], mean [N], rstd [N]."""
    match implementation(word):
        case "triton":
            from minbert_fast.kernels import embedding as kernels

            tables = (word.contiguous(), position.contiguous(), type_.contiguous())
            return kernels.embedding_forward(tokens, positions, types, *tables, gamma, beta, eps, p, seed, site)
        case "native":
            tables = (word.contiguous(), position.contiguous(), type_.contiguous())
            return layers.embedding_forward(tokens, positions, types, *tables, gamma, beta, eps, p, seed, site)
        case "torch":
            z = _summed(tokens, positions, types, word, position, type_)
            y, mean, rstd = torch.native_layer_norm(z, gamma.shape, gamma.to(z.dtype), beta.to(z.dtype), eps)
            return _dropped(y, p, seed, site).to(word.dtype), mean.squeeze(-1), rstd.squeeze(-1)


@_forward.register_fake
def _(
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    p: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = tokens.shape[0]
    statistics = word.new_empty(rows, dtype=segments.statistics_dtype(word.dtype))
    return word.new_empty(rows, word.shape[1]), statistics, torch.empty_like(statistics)


@custom_op("embedding_norm_backward", mutates_args=("dgamma", "dbeta", "dtype"))
def _norm_backward(
    dy: Tensor,
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    dtype: Tensor | None,
) -> Tensor:
    """dz [N, H], the gradient of the summed rows; writes each task's dgamma, dbeta [T, H] and dtype [T, K, H]."""
    match implementation(word):
        case "triton":
            from minbert_fast.kernels import embedding as kernels

            tables = (word.contiguous(), position.contiguous(), type_.contiguous())
            return kernels.embedding_norm_backward(
                dy.contiguous(),
                tokens,
                positions,
                types,
                *tables,
                gamma,
                mean,
                rstd,
                bounds,
                p,
                seed,
                site,
                dgamma,
                dbeta,
                dtype,
            )
        case "native" | "torch":
            z = _summed(tokens, positions, types, word, position, type_)
            dy = _dropped(dy.to(z.dtype), p, seed, site)
            dz = norm_backward(dy, z, gamma, mean, rstd, bounds, dgamma, dbeta)
            if dtype is not None:
                for task, (begin, end) in enumerate(segments.segments(bounds)):
                    dtype[task] = _summed_by(types[begin:end], dz[begin:end], type_.shape[0])
            return dz.to(word.dtype)


@_norm_backward.register_fake
def _(
    dy: Tensor,
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bounds: Tensor,
    p: float,
    seed: Tensor | None,
    site: int,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    dtype: Tensor | None,
) -> Tensor:
    return dy.new_empty(dy.shape)


@custom_op("embedding_gather", mutates_args=("dword", "dposition"))
def _gather(
    dz: Tensor,
    bounds: Tensor,
    cu_seqlens: Tensor,
    word_order: Tensor,
    word_offsets: Tensor,
    dword: Tensor | None,
    dposition: Tensor | None,
) -> None:
    """Adds up dz [N, H] by task and distinct word (dword [T, U, H]), by task and position (dposition [T, S, H])."""
    match implementation(dz):
        case "triton":
            from minbert_fast.kernels import embedding as kernels

            kernels.embedding_gather(dz, bounds, cu_seqlens, word_order, word_offsets, dword, dposition)
        case "native" | "torch":
            rows = torch.arange(len(dz), device=dz.device)
            words = torch.empty_like(rows)
            distinct = torch.arange(len(word_offsets) - 1, device=dz.device)
            counts = word_offsets.diff()
            words[word_order[: int(counts.sum())].long()] = distinct.repeat_interleave(counts)
            sentence = torch.searchsorted(cu_seqlens.long(), rows, right=True) - 1
            places = rows - cu_seqlens.long()[sentence]
            for task, (begin, end) in enumerate(segments.segments(bounds)):
                if dword is not None:
                    dword[task] = _summed_by(words[begin:end], dz[begin:end], dword.shape[1])
                if dposition is not None:
                    dposition[task] = _summed_by(places[begin:end], dz[begin:end], dposition.shape[1])


@_gather.register_fake
def _(
    dz: Tensor,
    bounds: Tensor,
    cu_seqlens: Tensor,
    word_order: Tensor,
    word_offsets: Tensor,
    dword: Tensor | None,
    dposition: Tensor | None,
) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, beta, _, ctx.p, seed, ctx.site = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.beta_dtype = beta.dtype
    ctx.save_for_backward(*tensors, mean, rstd, seed)


def _autograd(ctx: Any, dy: Tensor, dmean: Tensor | None, drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    tokens, positions, types, word, position, type_, gamma, mean, rstd, seed = ctx.saved_tensors
    dgamma = gamma.new_empty(1, *gamma.shape)
    dbeta = torch.empty_like(dgamma, dtype=ctx.beta_dtype)
    dtype = type_.new_empty(1, *type_.shape)
    bounds = segments.one_segment(tokens.shape[0], word.device)
    inputs = (tokens, positions, types, word, position, type_)
    dz = _norm_backward(dy, *inputs, gamma, mean, rstd, bounds, ctx.p, seed, ctx.site, dgamma, dbeta, dtype)
    dword = _dense_gradient(dz, tokens, word) if ctx.needs_input_grad[3] else None
    dposition = _dense_gradient(dz, positions, position) if ctx.needs_input_grad[4] else None
    return None, None, None, dword, dposition, dtype[0], dgamma[0], dbeta[0], None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


class _EmbeddingInto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        positions: Tensor,
        types: Tensor,
        word: Tensor,
        position: Tensor,
        type_: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        p: float,
        seed: Tensor | None,
        site: int,
        into: EmbeddingSink,
        anchor: Tensor,
    ) -> Tensor:
        inputs = (tokens, positions, types, word, position, type_, gamma)
        y, mean, rstd = _forward(*inputs, beta, eps, p, seed, site)
        ctx.p, ctx.site, ctx.into = p, site, into
        ctx.save_for_backward(*inputs, mean, rstd, seed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, ...]:
        into: EmbeddingSink = ctx.into
        *tensors, seed = ctx.saved_tensors
        if implementation(dy) == "native":
            tokens, positions, types, word, position, type_, gamma, mean, rstd = tensors
            layers.embedding_backward(
                dy.contiguous(),
                tokens,
                positions,
                types,
                word,
                position,
                type_,
                gamma,
                mean,
                rstd,
                into.bounds,
                into.word_order,
                into.word_offsets,
                ctx.p,
                seed,
                ctx.site,
                into.dgamma,
                into.dbeta,
                into.dword,
                into.dposition,
                into.dtype,
            )
            return (None,) * 14
        dz = _norm_backward(dy, *tensors, into.bounds, ctx.p, seed, ctx.site, into.dgamma, into.dbeta, into.dtype)
        _gather(dz, into.bounds, into.cu_seqlens, into.word_order, into.word_offsets, into.dword, into.dposition)
        return (None,) * 14


def _summed(tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor) -> Tensor:
    """word + position + type rows [N, H] in the dtype of statistics."""
    dtype = segments.statistics_dtype(word.dtype)
    return word[tokens].to(dtype) + position[positions].to(dtype) + type_[types].to(dtype)


def _dropped(y: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    if p == 0.0:
        return y
    assert seed is not None
    return y * keep_mask(seed, site, torch.arange(len(y), device=y.device), y.shape[1], p).to(y.dtype)


def _summed_by(index: Tensor, rows: Tensor, size: int) -> Tensor:
    """Rows [n, H] added up by index -> [size, H], in the dtype of statistics."""
    total = rows.new_zeros(size, rows.shape[1], dtype=segments.statistics_dtype(rows.dtype))
    return total.index_add_(0, index, rows.to(total.dtype))


def _dense_gradient(dz: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """The gradient of table[index], dense like the table; sorts on a GPU, so deterministic."""
    wide = dz.to(segments.statistics_dtype(dz.dtype))
    return torch.ops.aten.embedding_dense_backward(wide, index, table.shape[0], -1, False).to(table.dtype)
