# SPDX-License-Identifier: Apache-2.0
"""y = dropout(LayerNorm(word[tokens] + position[positions] + type[types])), and the gradients of its tables by task.

The backward has two stages. The first walks down the rows as add_norm's does: it finds dz, the gradient of the sum
before the norm, writes it once, and keeps the column sums that small parameters need (dgamma, dbeta, and a row per
token type). The second gathers: a program owns one (task, word) or one (task, position) and adds up that row's
share of dz in ascending row order, so the result is deterministic without an atomic. Words touch few rows, and
their gradient is row-sparse: dword[t, u] belongs to the u-th distinct word of the batch. Word rows come from the
packed batch (word_order, word_offsets); a position's rows are cu_seqlens[b] + position of every sentence long
enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import all_registers, cdiv, next_power_of_2
from minbert_fast.kernels.column_sums import Partition, finish, store_partial, task_rows
from minbert_fast.kernels.dropout import keep_scale_quads
from minbert_fast.kernels.launches import Launch, meta
from minbert_fast.kernels.layer_norm import RowTile, norm_gradient, normalise

#: Gradients of the type rows stay in registers beside dgamma and dbeta.
MAX_TYPES = 8
#: Rows that a program of the second stage adds at once, and indices that it searches at once for its task's rows.
GATHER_ROWS, GATHER_SCAN = 8, 512


@triton.jit
def _summed(
    tokens_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, type_ptr, words, places, kinds, row, valid, columns,
    within, WIDTH: tl.constexpr,
):  # fmt: skip
    """word + position + type rows [ROWS, BLOCK] in fp32, zero outside the mask, and the rows' types.

    A GPU cannot refuse an index that its table (of `words`, `places`, `kinds` rows) does not have: its row is NaN.
    """
    token = tl.load(tokens_ptr + row, mask=valid, other=0).to(tl.int64)
    position = tl.load(positions_ptr + row, mask=valid, other=0).to(tl.int64)
    kind = tl.load(types_ptr + row, mask=valid, other=0)
    known = (token >= 0) & (token < words) & (position >= 0) & (position < places) & (kind >= 0) & (kind < kinds)
    mask = (valid & known)[:, None] & within[None, :]
    z = tl.load(word_ptr + token[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(position_ptr + position[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(type_ptr + kind.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where((valid & ~known)[:, None], float("nan"), z), kind


@triton.jit(do_not_specialize=["site"])
def _embedding_forward(
    tokens_ptr,  # [rows] int32, as the two below
    positions_ptr,
    types_ptr,
    word_ptr,  # [V, WIDTH]
    position_ptr,  # [S, WIDTH]
    type_ptr,  # [K, WIDTH]
    gamma_ptr,  # [WIDTH]
    beta_ptr,  # [WIDTH]
    y_ptr,  # [rows, WIDTH]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    seed_ptr,  # [1] int64
    site, rows, words, places, kinds, eps,
    P: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    within = columns < WIDTH
    z, _ = _summed(
        tokens_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, type_ptr, words, places, kinds, row, row < rows,
        columns, within, WIDTH,
    )  # fmt: skip
    y, mean, rstd = normalise(z, gamma_ptr, beta_ptr, columns, within, eps, WIDTH)
    if P > 0.0:
        y *= keep_scale_quads(tl.load(seed_ptr), site, row[:, None], tl.arange(0, BLOCK // 4)[None, :], P)
    offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & within[None, :])
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["site"])
def _embedding_backward(
    dy_ptr,  # [rows, WIDTH]
    tokens_ptr,  # [rows] int32, as the two below
    positions_ptr,
    types_ptr,
    word_ptr,  # [V, WIDTH]
    position_ptr,  # [S, WIDTH]
    type_ptr,  # [K, WIDTH]
    gamma_ptr,  # [WIDTH]
    mean_ptr,  # [rows] fp32
    rstd_ptr,  # [rows] fp32
    bounds_ptr,  # [tasks + 1] int32
    dz_ptr,  # [rows, WIDTH]; rows of no task are not written
    partials_ptr,  # [programs + tasks - 1, 2 + K, WIDTH] fp32: dgamma, dbeta, types
    seed_ptr,  # [1] int64
    site, rows, words, places, tasks, rows_per_program,
    P: tl.constexpr, K: tl.constexpr,
    KINDS: tl.constexpr,  # K rounded up to a power of two
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    columns = tl.arange(0, BLOCK)
    within = columns < WIDTH
    kinds = tl.arange(0, KINDS)
    seed = tl.load(seed_ptr) if P > 0.0 else 0
    gamma = tl.load(gamma_ptr + columns, mask=within, other=0.0).to(tl.float32)
    for task in range(tasks):
        low, high = task_rows(bounds_ptr, task, begin, end)
        if low < high:
            dgamma = tl.zeros((BLOCK,), tl.float32)
            dbeta = tl.zeros((BLOCK,), tl.float32)
            dkinds = tl.zeros((KINDS, BLOCK), tl.float32)
            for first in range(low, high, ROWS):
                row = first + tl.arange(0, ROWS)
                valid = row < high
                mask = valid[:, None] & within[None, :]
                offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
                z, kind = _summed(
                    tokens_ptr, positions_ptr, types_ptr, word_ptr, position_ptr, type_ptr, words, places, K, row, valid,
                    columns, within, WIDTH,
                )  # fmt: skip
                dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                if P > 0.0:
                    dy *= keep_scale_quads(seed, site, row[:, None], tl.arange(0, BLOCK // 4)[None, :], P)
                dz, xhat = norm_gradient(dy, z, gamma, mean_ptr, rstd_ptr, row, mask, valid, WIDTH)
                tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
                dgamma += tl.sum(dy * xhat, 0)
                dbeta += tl.sum(dy, 0)
                for k in tl.static_range(K):
                    share = tl.sum(tl.where((kind == k)[:, None], dz, 0.0), 0)
                    dkinds += tl.where((kinds == k)[:, None], share[None, :], 0.0)
            store_partial(partials_ptr, program + task, 0, dgamma, columns, 2 + K, WIDTH)
            store_partial(partials_ptr, program + task, 1, dbeta, columns, 2 + K, WIDTH)
            for k in tl.static_range(K):
                share = tl.sum(tl.where((kinds == k)[:, None], dkinds, 0.0), 0)
                store_partial(partials_ptr, program + task, 2 + k, share, columns, 2 + K, WIDTH)


@triton.jit
def _count_below(values_ptr, begin, end, limit, SCAN: tl.constexpr):
    """How many of the ascending values [begin, end) are below `limit`."""
    count = begin * 0
    for first in range(begin, end, SCAN):
        index = first + tl.arange(0, SCAN)
        value = tl.load(values_ptr + index, mask=index < end, other=2147483647)
        count += tl.sum((value < limit).to(tl.int32), 0)
    return count


@triton.jit
def _gathered(dz_ptr, row, valid, columns, within, WIDTH: tl.constexpr):
    """Those rows of dz that are valid [ROWS, COLUMNS], else zero."""
    offsets = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    return tl.load(dz_ptr + offsets, mask=valid[:, None] & within[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["padding"])
def _embedding_gather(
    dz_ptr,  # [rows, WIDTH]
    tokens_ptr,  # [rows] int32
    bounds_ptr,  # [T + 1] int32
    cu_seqlens_ptr,  # [sentences + 1] int32
    word_order_ptr,  # [rows] int32
    word_offsets_ptr,  # [U + 1] int32
    dposition_ptr,  # [T, positions, WIDTH] or None
    dword_ptr,  # [T, U, WIDTH] or None
    dposition_stride, dword_stride,
    positions,  # programs along axis 0 that belong to positions; the others belong to words
    sentences, padding,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    task = tl.program_id(1)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < WIDTH
    low = tl.load(bounds_ptr + task)
    high = tl.load(bounds_ptr + task + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if slot < positions:  # first, because these run longest
        if dposition_ptr is not None:
            begin = _count_below(cu_seqlens_ptr, 0, sentences, low, SCAN)
            end = _count_below(cu_seqlens_ptr, 0, sentences, high, SCAN)
            for first in range(begin, end, ROWS):
                sentence = first + tl.arange(0, ROWS)
                listed = sentence < end
                row = tl.load(cu_seqlens_ptr + sentence, mask=listed, other=0) + slot
                valid = listed & (row < tl.load(cu_seqlens_ptr + sentence + 1, mask=listed, other=0))
                total += _gathered(dz_ptr, row, valid, columns, within, WIDTH)
            out = task.to(tl.int64) * dposition_stride + slot.to(tl.int64) * WIDTH
            tl.store(dposition_ptr + out + columns, tl.sum(total, 0).to(dposition_ptr.dtype.element_ty), mask=within)
    else:
        if dword_ptr is not None:
            word = slot - positions
            begin = tl.load(word_offsets_ptr + word)
            end = tl.load(word_offsets_ptr + word + 1)
            index = begin + tl.arange(0, ROWS)
            row = tl.load(word_order_ptr + index, mask=index < end, other=-1)
            token = tl.load(tokens_ptr + row, mask=row >= 0, other=-2)
            is_padding = tl.max((token == padding).to(tl.int32), 0)
            if end - begin > ROWS:  # a frequent word: find the task's share first
                share = begin + _count_below(word_order_ptr, begin, end, low, SCAN)
                end = begin + _count_below(word_order_ptr, begin, end, high, SCAN)
                begin = share
            for first in range(begin, end, ROWS):
                index = first + tl.arange(0, ROWS)
                row = tl.load(word_order_ptr + index, mask=index < end, other=-1)
                valid = (row >= low) & (row < high)
                total += _gathered(dz_ptr, row, valid, columns, within, WIDTH)
            out = task.to(tl.int64) * dword_stride + word.to(tl.int64) * WIDTH
            own = tl.where(is_padding > 0, 0.0, tl.sum(total, 0))
            tl.store(dword_ptr + out + columns, own.to(dword_ptr.dtype.element_ty), mask=within)


def embedding_forward(
    tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
    gamma: Tensor, beta: Tensor, eps: float, p: float, seed: Tensor | None, site: int,
    y: Tensor, mean: Tensor, rstd: Tensor,
) -> None:  # fmt: skip
    """Indices [N] int32; word [V, H], position [S, H], type_ [K, H] contiguous; gamma, beta [H].

    Writes y [N, H] in the tables' dtype and fp32 mean, rstd [N]: NaN for an index that its table does not have.
    """
    rows, width = y.shape
    tile = RowTile.of(width)
    if rows:
        _embedding_forward[(cdiv(rows, tile.rows),)](
            tokens, positions, types, word, position, type_, gamma, beta, y, mean, rstd, seed, site, rows,
            word.shape[0], position.shape[0], type_.shape[0], eps, **tile.launch(width, p),
        )  # fmt: skip


def embedding_backward(
    dy: Tensor, tokens: Tensor, positions: Tensor, types: Tensor, word: Tensor, position: Tensor, type_: Tensor,
    gamma: Tensor, mean: Tensor, rstd: Tensor, bounds: Tensor, cu_seqlens: Tensor, word_order: Tensor,
    word_offsets: Tensor, p: float, seed: Tensor | None, site: int, dword: Tensor | None, dposition: Tensor | None,
    d_type_table: Tensor | None, dgamma: Tensor | None, dbeta: Tensor | None, padding: int,
) -> None:  # fmt: skip
    """Writes dword [T, U, H], dposition [T, S, H], d_type_table [T, K, H], dgamma, dbeta [T, H].

    None: not wanted; any task stride. Sentences are cu_seqlens [B + 1] and their positions count from 0; word_order,
    word_offsets as PackedBatch has them. The gradient of word `padding` is 0 (-1: of none).
    """
    (rows, width), kinds = dy.shape, type_.shape[0]
    if kinds > MAX_TYPES:
        raise ValueError(f"at most {MAX_TYPES} token types, not {kinds}")
    tile, tasks = RowTile.of(width), bounds.numel() - 1
    tile = replace(tile, rows=max(1, tile.rows // 2))  # the sums by type need the other half of the registers
    partition = Partition.among(rows, tile.rows, tile.programs(dy.device))
    partials = partition.partials(tasks, 2 + kinds, width, dy.device)
    dz = torch.empty_like(dy)
    _embedding_backward[(partition.programs,)](
        dy, tokens, positions, types, word, position, type_, gamma, mean, rstd, bounds, dz, partials, seed, site,
        rows, word.shape[0], position.shape[0], tasks, partition.rows_per_program, K=kinds, KINDS=next_power_of_2(kinds),
        **tile.launch(width, p), **all_registers(dy.device, tile.num_warps),
    )  # fmt: skip
    finish(partials, bounds, partition, (dgamma, dbeta, d_type_table))
    if dword is None and dposition is None:
        return
    # Most words occur once or twice in a batch. The number of programs sets the time, so each takes up to 1,024 columns.
    columns = min(1024, max(64, next_power_of_2(width)))
    places = 0 if dposition is None else dposition.shape[1]
    programs = places + (0 if dword is None else dword.shape[1])
    _embedding_gather[(programs, tasks, cdiv(width, columns))](
        dz, tokens, bounds, cu_seqlens, word_order, word_offsets, dposition, dword,
        0 if dposition is None else dposition.stride(0), 0 if dword is None else dword.stride(0),
        places, cu_seqlens.numel() - 1, padding, WIDTH=width, ROWS=GATHER_ROWS, COLUMNS=columns, SCAN=GATHER_SCAN,
        num_warps=max(1, columns // 256), enable_fp_fusion=True,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    """Each dtype and each row tile's width, for the ahead-of-time check."""
    settings = [(torch.bfloat16, width) for width in (100, 128, 384, 768, 2048, 4096)]
    for dtype, width in [(torch.float16, 768), *settings, (torch.float32, 768)]:
        index, offsets, bounds = (meta(n, dtype=torch.int32) for n in (2816, 2817, 4))
        *tables, dy = (meta(size, width, dtype=dtype) for size in (30522, 512, 2, 2816))
        vector, rows, seed = meta(width), meta(2816), meta(1, dtype=torch.int64)
        small, large = meta(3, width), [meta(3, size, width) for size in (2816, 512, 2)]
        label = f"{str(dtype)[6:]} {width}"
        inputs = (index, index, index, *tables, vector)
        forward = (*inputs, vector, 1e-12, 0.1, seed, 1, dy, rows, rows)
        yield Launch(f"forward {label}", partial(embedding_forward, *forward))
        saved = (*inputs, rows, rows, bounds, offsets, index, offsets)
        backward = (dy, *saved, 0.1, seed, 1, *large, small, small, 0)
        yield Launch(f"backward {label}", partial(embedding_backward, *backward))
