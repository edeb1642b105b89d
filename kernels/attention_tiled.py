# SPDX-License-Identifier: Apache-2.0
"""Attention over longer sentences: tiles of queries times tiles of keys, with an online softmax.

The forward is FlashAttention-2's (Dao 2023, algorithm 1). The backward splits its algorithm 2 by what a program owns:
a tile of keys, to sum dK and dV, or a tile of queries, to sum dQ, so there are no atomics and sums always run in the
same order. Sentences up to `above` tokens belong to attention_short.py, which also clears the rows behind the last
sentence.

Only the device knows which sentences are long. A fixed number of programs divides up the tiles that exist. So a batch
with few long sentences, or none, does not pay for all the tiles that its capacity would allow.

Shapes as in attention_short.py; T tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minbert_fast.kernels.attention_short import LN_2, LOG2_E, attended, dropout_keeps, load_rows, store_rows


@triton.jit
def _tiles(offsets_ptr, start, sentences, above, T: tl.constexpr):
    """Tiles of sentences start to start + 256 [256]: none for those of at most `above` tokens."""
    sentence = start + tl.arange(0, 256)
    begin = tl.load(offsets_ptr + sentence, mask=sentence < sentences, other=0)
    length = tl.load(offsets_ptr + sentence + 1, mask=sentence < sentences, other=0) - begin
    return tl.where(length > above, (length + T - 1) // T, 0)


@triton.jit
def count_tiles(offsets_ptr, sentences, above, T: tl.constexpr):
    """How many tiles there are in all sentences of more than `above` tokens."""
    total = 0
    for start in range(0, sentences, 256):
        total += tl.sum(_tiles(offsets_ptr, start, sentences, above, T))
    return total


@triton.jit
def find_tile(offsets_ptr, sentences, above, tile, T: tl.constexpr):
    """The sentence that tile number `tile` belongs to, and its first token there."""
    found = 0
    first = 0
    before = 0
    for start in range(0, sentences, 256):
        count = _tiles(offsets_ptr, start, sentences, above, T)
        behind = before + tl.cumsum(count)
        here = (tile < behind) & (tile >= behind - count)
        found += tl.sum(tl.where(here, start + tl.arange(0, 256), 0))
        first += tl.sum(tl.where(here, (tile - behind + count) * T, 0))
        before += tl.sum(count)
    return found, first


@triton.jit
def _forward_queries(
    q_ptr, out_ptr, lse_ptr, mask_ptr, seed_ptr,  # at this head in row 0
    begin, length, first, head, part, qkv_stride, scale, site,
    T: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of queries first to first + T."""
    query = first + tl.arange(0, T)
    q = load_rows(q_ptr, begin + query, query < length, qkv_stride, HEAD_DIM, D, COMPUTE)
    out = tl.zeros((T, D), tl.float32)
    total = tl.zeros((T,), tl.float32)
    top = tl.full((T,), float("-inf"), tl.float32)
    for start in range(0, length, T):
        key = start + tl.arange(0, T)
        k = load_rows(q_ptr + part, begin + key, key < length, qkv_stride, HEAD_DIM, D, COMPUTE)
        v = load_rows(q_ptr + 2 * part, begin + key, key < length, qkv_stride, HEAD_DIM, D, COMPUTE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)  # [T queries, T keys], base 2
        scores = tl.where(attended(query, key, begin, length, mask_ptr), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing attended to so far
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        if P > 0:
            weights = tl.where(dropout_keeps(seed_ptr, site, head, begin + query, start, T, P) != 0, weights, 0.0)
        out = tl.dot(weights.to(COMPUTE), v, out * shrink[:, None], input_precision=PRECISION)
        top = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_rows(out_ptr, begin + query, query < length, part, out / (total * (1.0 - P))[:, None], HEAD_DIM, D)
    lse = tl.where(empty, 0.0, (top + tl.log2(total)) * LN_2)
    tl.store(lse_ptr + begin + query, lse, mask=query < length)


@triton.jit(do_not_specialize=["site"])
def tiled_forward(
    qkv_ptr,  # [N, 3, h, d], rows qkv_stride apart
    out_ptr,  # [N, h * d]
    lse_ptr,  # [h, N] fp32
    offsets_ptr,  # [B + 1] int32
    mask_ptr,  # [N] or None: rows that may be attended to
    seed_ptr,  # [1] int64, or None without dropout
    rows, sentences, heads, above, qkv_stride, scale, site,
    T: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, lse of sentences above `above` tokens. Any grid: programs take (tile of queries, head) pairs in turn."""
    part = heads * HEAD_DIM
    work = count_tiles(offsets_ptr, sentences, above, T) * heads
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        head = item % heads
        sentence, first = find_tile(offsets_ptr, sentences, above, item // heads, T)
        begin = tl.load(offsets_ptr + sentence)
        length = tl.load(offsets_ptr + sentence + 1) - begin
        _forward_queries(
            qkv_ptr + head * HEAD_DIM, out_ptr + head * HEAD_DIM, lse_ptr + head.to(tl.int64) * rows, mask_ptr, seed_ptr,
            begin, length, first, head, part, qkv_stride, scale, site, T, HEAD_DIM, D, P, COMPUTE, PRECISION,
        )  # fmt: skip


@triton.jit
def _backward_keys(
    dout_ptr, q_ptr, out_ptr, lse_ptr, mask_ptr, seed_ptr, dq_ptr,  # at this head in row 0
    begin, length, first, head, part, dout_stride, qkv_stride, scale, site,
    T: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of keys first to first + T, summed over the sentence's queries."""
    key = first + tl.arange(0, T)
    k = load_rows(q_ptr + part, begin + key, key < length, qkv_stride, HEAD_DIM, D, COMPUTE)
    v = load_rows(q_ptr + 2 * part, begin + key, key < length, qkv_stride, HEAD_DIM, D, COMPUTE)
    dk = tl.zeros((T, D), tl.float32)
    dv = tl.zeros((T, D), tl.float32)
    for start in range(0, length, T):
        query = start + tl.arange(0, T)
        q = load_rows(q_ptr, begin + query, query < length, qkv_stride, HEAD_DIM, D, COMPUTE)
        dout = load_rows(dout_ptr, begin + query, query < length, dout_stride, HEAD_DIM, D, COMPUTE)
        out = load_rows(out_ptr, begin + query, query < length, part, HEAD_DIM, D, COMPUTE)
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        lse = tl.load(lse_ptr + begin + query, mask=query < length, other=0.0)
        # Scores are [keys, queries] here, so the left operands of the products with dout and q need no transpose.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[None, :])
        weights = tl.where(attended(key, query, begin, length, mask_ptr), weights, 0.0)
        kept = weights
        if P > 0:
            keeps = tl.trans(dropout_keeps(seed_ptr, site, head, begin + query, first, T, P))
            kept = tl.where(keeps != 0, weights / (1.0 - P), 0.0)
        dv = tl.dot(kept.to(COMPUTE), dout, dv, input_precision=PRECISION)
        product = kept * tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dscores = (product - weights * delta[None, :]).to(COMPUTE)
        dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
    store_rows(dq_ptr + part, begin + key, key < length, 3 * part, dk * scale, HEAD_DIM, D)
    store_rows(dq_ptr + 2 * part, begin + key, key < length, 3 * part, dv, HEAD_DIM, D)


@triton.jit
def _backward_queries(
    dout_ptr, q_ptr, out_ptr, lse_ptr, mask_ptr, seed_ptr, dq_ptr,
    begin, length, first, head, part, dout_stride, qkv_stride, scale, site,
    T: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of queries first to first + T, summed over the sentence's keys."""
    query = first + tl.arange(0, T)
    q = load_rows(q_ptr, begin + query, query < length, qkv_stride, HEAD_DIM, D, COMPUTE)
    dout = load_rows(dout_ptr, begin + query, query < length, dout_stride, HEAD_DIM, D, COMPUTE)
    out = load_rows(out_ptr, begin + query, query < length, part, HEAD_DIM, D, COMPUTE)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + begin + query, mask=query < length, other=0.0)
    dq = tl.zeros((T, D), tl.float32)
    for start in range(0, length, T):
        key = start + tl.arange(0, T)
        k = load_rows(q_ptr + part, begin + key, key < length, qkv_stride, HEAD_DIM, D, COMPUTE)
        v = load_rows(q_ptr + 2 * part, begin + key, key < length, qkv_stride, HEAD_DIM, D, COMPUTE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
        weights = tl.where(attended(query, key, begin, length, mask_ptr), weights, 0.0)
        product = weights * tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if P > 0:
            keeps = dropout_keeps(seed_ptr, site, head, begin + query, start, T, P)
            product = tl.where(keeps != 0, product / (1.0 - P), 0.0)
        dscores = (product - weights * delta[:, None]).to(COMPUTE)
        dq = tl.dot(dscores, k, dq, input_precision=PRECISION)
    store_rows(dq_ptr, begin + query, query < length, 3 * part, dq * scale, HEAD_DIM, D)


@triton.jit(do_not_specialize=["site"])
def tiled_backward(
    dout_ptr,  # [N, h * d], rows dout_stride apart
    qkv_ptr,  # [N, 3, h, d], rows qkv_stride apart
    out_ptr,  # [N, h * d]
    lse_ptr,  # [h, N] fp32
    dqkv_ptr,  # [N, 3, h, d]
    offsets_ptr,  # [B + 1] int32
    mask_ptr,  # [N] or None: rows that may be attended to
    seed_ptr,  # [1] int64, or None without dropout
    rows, sentences, heads, above, dout_stride, qkv_stride, scale, site,
    KEYS: tl.constexpr, QUERIES: tl.constexpr,  # tokens of a tile of keys and of a tile of queries
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dqkv of sentences above `above` tokens. Any grid: programs take (tile, head) pairs in turn, keys' first."""
    part = heads * HEAD_DIM
    programs = tl.num_programs(0)
    of_keys = count_tiles(offsets_ptr, sentences, above, KEYS) * heads
    for item in range(tl.program_id(0), of_keys, programs):
        head = item % heads
        sentence, first = find_tile(offsets_ptr, sentences, above, item // heads, KEYS)
        begin = tl.load(offsets_ptr + sentence)
        length = tl.load(offsets_ptr + sentence + 1) - begin
        _backward_keys(
            dout_ptr + head * HEAD_DIM, qkv_ptr + head * HEAD_DIM, out_ptr + head * HEAD_DIM,
            lse_ptr + head.to(tl.int64) * rows, mask_ptr, seed_ptr, dqkv_ptr + head * HEAD_DIM,
            begin, length, first, head, part, dout_stride, qkv_stride, scale, site,
            KEYS, HEAD_DIM, D, P, COMPUTE, PRECISION,
        )  # fmt: skip
    of_queries = count_tiles(offsets_ptr, sentences, above, QUERIES) * heads
    # The last programs had the fewest tiles of keys, so they begin.
    for item in range(programs - 1 - tl.program_id(0), of_queries, programs):
        head = item % heads
        sentence, first = find_tile(offsets_ptr, sentences, above, item // heads, QUERIES)
        begin = tl.load(offsets_ptr + sentence)
        length = tl.load(offsets_ptr + sentence + 1) - begin
        _backward_queries(
            dout_ptr + head * HEAD_DIM, qkv_ptr + head * HEAD_DIM, out_ptr + head * HEAD_DIM,
            lse_ptr + head.to(tl.int64) * rows, mask_ptr, seed_ptr, dqkv_ptr + head * HEAD_DIM,
            begin, length, first, head, part, dout_stride, qkv_stride, scale, site,
            QUERIES, HEAD_DIM, D, P, COMPUTE, PRECISION,
        )  # fmt: skip
