# SPDX-License-Identifier: Apache-2.0
"""Attention over short sentences: one program owns one (sentence, head), all of it on chip at once.

One tile holds all scores of the sentence, so the softmax needs no loop. One program computes dQ, dK and dV of its
sentence and head, so the backward needs neither atomics nor a second pass. A program picks the smallest tile that holds
its sentence. Sentences above the largest tile are left to attention_tiled.py: the largest tile of a kernel decides how
many programs a multiprocessor holds, and these kernels need many.

Shapes: N rows, B sentences, h heads, d head_dim; T tokens of a tile, D = d rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minbert_fast.kernels.dropout import keep_quads

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, row, valid, stride, HEAD_DIM: tl.constexpr, D: tl.constexpr, COMPUTE: tl.constexpr):
    """One head's part of rows `row` [R] -> [R, D], zero where a row is not valid and beyond HEAD_DIM.

    `ptr` points at the head in row 0. Row numbers become int64 before they meet a stride.
    """
    column = tl.arange(0, D)
    mask = valid[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def store_rows(ptr, row, valid, stride, value, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Writes [R, D] where `load_rows` reads."""
    column = tl.arange(0, D)
    mask = valid[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(ptr + row.to(tl.int64)[:, None] * stride + column[None, :], value, mask=mask)


@triton.jit
def clear_rows(ptr, first, last, step, stride, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Writes zeros into one head's part of rows first to last, 16 rows at a time, every `step` rows."""
    for start in range(first, last, step):
        row = start + tl.arange(0, 16)
        store_rows(ptr, row, row < last, stride, tl.zeros((16, D), tl.float32), HEAD_DIM, D)


@triton.jit
def attended(query, key, begin, length, mask_ptr):
    """Which scores count [M, K]: pairs inside the sentence, both attended where there is a mask [N]."""
    valid_query = query < length
    valid_key = key < length
    if mask_ptr is not None:
        valid_query &= tl.load(mask_ptr + begin + query, mask=valid_query, other=0) != 0
        valid_key &= tl.load(mask_ptr + begin + key, mask=valid_key, other=0) != 0
    return valid_query[:, None] & valid_key[None, :]


@triton.jit
def dropout_keeps(seed_ptr, site, head, row, first_key, T: tl.constexpr, P: tl.constexpr):
    """Which probabilities dropout keeps [., T]: of query rows `row` and T keys of their sentence from `first_key` on.

    first_key is a multiple of 4. int8, 1 or 0; the caller multiplies kept ones by 1 / (1 - P).
    """
    quad = first_key // 4 + tl.arange(0, T // 4)
    return keep_quads(tl.load(seed_ptr), site, head, row[:, None], quad[None, :], P)


@triton.jit
def _forward_sentence(
    q_ptr, out_ptr, lse_ptr, mask_ptr, seed_ptr,  # at this head in row 0: [N, d] each, then [N]; mask [N]; seed [1]
    begin, length, head, part, qkv_stride, scale, site,
    T: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, T)
    row, inside = begin + token, token < length
    q = load_rows(q_ptr, row, inside, qkv_stride, HEAD_DIM, D, COMPUTE)
    k = load_rows(q_ptr + part, row, inside, qkv_stride, HEAD_DIM, D, COMPUTE)
    v = load_rows(q_ptr + 2 * part, row, inside, qkv_stride, HEAD_DIM, D, COMPUTE)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)  # [T, T], base 2
    scores = tl.where(attended(token, token, begin, length, mask_ptr), scores, float("-inf"))
    top = tl.max(scores, 1)
    top = tl.where(top == float("-inf"), 0.0, top)  # a row that attends to nothing
    weights = tl.exp2(scores - top[:, None])
    total = tl.sum(weights, 1)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if P > 0:
        weights = tl.where(dropout_keeps(seed_ptr, site, head, row, 0, T, P) != 0, weights, 0.0)
    out = tl.dot(weights.to(COMPUTE), v, input_precision=PRECISION) / (total * (1.0 - P))[:, None]
    store_rows(out_ptr, row, inside, part, out, HEAD_DIM, D)
    tl.store(lse_ptr + row, tl.where(empty, 0.0, (top + tl.log2(total)) * LN_2), mask=inside)


@triton.jit(do_not_specialize=["site"])
def short_forward(
    qkv_ptr,  # [N, 3, h, d], rows qkv_stride apart
    out_ptr,  # [N, h * d]
    lse_ptr,  # [h, N] fp32
    offsets_ptr,  # [B + 1] int32
    mask_ptr,  # [N] or None: rows that may be attended to
    seed_ptr,  # [1] int64, or None without dropout
    rows, sentences, heads, qkv_stride, scale, site,
    TILES: tl.constexpr,  # how many tile sizes: 16, 32, 64, 128 tokens
    HEAD_DIM: tl.constexpr, D: tl.constexpr, P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, lse of one sentence and head. Grid: B * h, the head running fastest."""
    sentence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin = tl.load(offsets_ptr + sentence)
    length = tl.load(offsets_ptr + sentence + 1) - begin
    part = heads * HEAD_DIM
    q_ptr = qkv_ptr + head * HEAD_DIM
    out_ptr += head * HEAD_DIM
    lse_ptr += head.to(tl.int64) * rows

    # Rows behind the last sentence, shared out among the sentences' programs.
    end = tl.load(offsets_ptr + sentences)
    clear_rows(out_ptr, end + sentence * 16, rows, sentences * 16, part, HEAD_DIM, D)
    for start in range(end + sentence * 16, rows, sentences * 16):
        row = start + tl.arange(0, 16)
        tl.store(lse_ptr + row, tl.zeros((16,), tl.float32), mask=row < rows)

    for power in tl.static_range(TILES):
        if (length > (8 << power) * (power > 0)) & (length <= (16 << power)):
            _forward_sentence(
                q_ptr, out_ptr, lse_ptr, mask_ptr, seed_ptr, begin, length, head, part, qkv_stride, scale, site,
                16 << power, HEAD_DIM, D, P, COMPUTE, PRECISION,
            )  # fmt: skip


@triton.jit
def _backward_sentence(
    dout_ptr, q_ptr, lse_ptr, mask_ptr, seed_ptr, dq_ptr,  # at this head in row 0
    begin, length, head, part, dout_stride, qkv_stride, scale, site,
    T: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, T)
    row, inside = begin + token, token < length
    q = load_rows(q_ptr, row, inside, qkv_stride, HEAD_DIM, D, COMPUTE)
    k = load_rows(q_ptr + part, row, inside, qkv_stride, HEAD_DIM, D, COMPUTE)
    v = load_rows(q_ptr + 2 * part, row, inside, qkv_stride, HEAD_DIM, D, COMPUTE)
    dout = load_rows(dout_ptr, row, inside, dout_stride, HEAD_DIM, D, COMPUTE)
    lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [T queries, T keys]
    weights = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
    weights = tl.where(attended(token, token, begin, length, mask_ptr), weights, 0.0)
    if P > 0:  # the sign says which weights dropout drops: one number in a register instead of two
        weights = tl.where(dropout_keeps(seed_ptr, site, head, row, 0, T, P) != 0, weights, -weights)
    kept = (tl.maximum(weights, 0.0) * (1.0 / (1.0 - P))).to(COMPUTE)
    dv = tl.dot(tl.trans(kept), dout, input_precision=PRECISION)
    store_rows(dq_ptr + 2 * part, row, inside, 3 * part, dv, HEAD_DIM, D)
    # The tile has every key, so the softmax's row sum is computed directly, without `out` and its rounding.
    product = tl.maximum(weights, 0.0) * tl.dot(dout, tl.trans(v), input_precision=PRECISION) * (1.0 / (1.0 - P))
    dscores = ((product - tl.abs(weights) * tl.sum(product, 1)[:, None]) * scale).to(COMPUTE)
    dk = tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
    store_rows(dq_ptr + part, row, inside, 3 * part, dk, HEAD_DIM, D)
    dq = tl.dot(dscores, k, input_precision=PRECISION)
    store_rows(dq_ptr, row, inside, 3 * part, dq, HEAD_DIM, D)


@triton.jit(do_not_specialize=["site"])
def short_backward(
    dout_ptr,  # [N, h * d], rows dout_stride apart
    qkv_ptr,  # [N, 3, h, d], rows qkv_stride apart
    lse_ptr,  # [h, N] fp32
    dqkv_ptr,  # [N, 3, h, d]
    offsets_ptr,  # [B + 1] int32
    mask_ptr,  # [N] or None: rows that may be attended to
    seed_ptr,  # [1] int64, or None without dropout
    rows, sentences, heads, dout_stride, qkv_stride, scale, site,
    TILES: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dqkv of one sentence and head. Grid: B * h, the head running fastest."""
    sentence = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    begin = tl.load(offsets_ptr + sentence)
    length = tl.load(offsets_ptr + sentence + 1) - begin
    part = heads * HEAD_DIM
    dout_ptr += head * HEAD_DIM
    q_ptr = qkv_ptr + head * HEAD_DIM
    dq_ptr = dqkv_ptr + head * HEAD_DIM
    lse_ptr += head.to(tl.int64) * rows

    end = tl.load(offsets_ptr + sentences)
    for which in tl.static_range(3):
        clear_rows(dq_ptr + which * part, end + sentence * 16, rows, sentences * 16, 3 * part, HEAD_DIM, D)

    for power in tl.static_range(TILES):
        if (length > (8 << power) * (power > 0)) & (length <= (16 << power)):
            _backward_sentence(
                dout_ptr, q_ptr, lse_ptr, mask_ptr, seed_ptr, dq_ptr, begin, length, head, part, dout_stride,
                qkv_stride, scale, site,
                16 << power, HEAD_DIM, D, P, COMPUTE, PRECISION,
            )  # fmt: skip
