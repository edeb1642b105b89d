# SPDX-License-Identifier: Apache-2.0
"""Masked multi-head self-attention on packed tokens: launchers of the short and the tiled kernels, and which runs when.

    attention_forward(qkv, cu_seqlens, max_seqlen, scale, p, seed, site) -> out, lse
    attention_backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, p, seed, site) -> dqkv
    attention_dense_forward / _backward: the same on a rectangle [B, S] with a mask of attended positions

Nothing here reads a device tensor's values: grids come from capacities and from `max_seqlen`, the caller's bound on a
sentence's length, so every launch can be captured in a CUDA graph. Sentences longer than `max_seqlen` are the caller's
error and stay unwritten. Products of fp32 tensors are full fp32 ("ieee"), never TF32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import all_registers, check_probability, multiprocessors
from minbert_fast.kernels.attention_short import dropout_keeps, short_backward, short_forward
from minbert_fast.kernels.attention_tiled import tiled_backward_keys, tiled_backward_queries, tiled_forward
from minbert_fast.kernels.launches import Launch

WIDEST_HEAD = 128

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Tile:
    """Settings of one tiled kernel: tiles of so many queries meet tiles of as many keys."""

    tokens: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LaunchTable:
    """How attention runs for one element size and head_dim."""

    short: tuple[tuple[int, int], ...]  # warps (forward, backward) of the short kernels with tiles up to 16, 32, ...
    forward: Tile  # longer sentences
    backward_keys: Tile
    backward_queries: Tile

    @property
    def longest_short(self) -> int:
        """Tokens of the longest sentence that a short kernel takes."""
        return 8 << len(self.short)


# By (bytes of an element, D). Chosen without a GPU, from registers and shared memory as the ahead-of-time check prints
# them: nothing spills on any chip, and a multiprocessor holds as many programs as that allows. (No fp32 product runs on
# NVIDIA's matrix units without losing digits, hence the smaller tiles.)
_TABLES: dict[tuple[int, int], LaunchTable] = {
    (2, 32): LaunchTable(((1, 1), (2, 2), (4, 4)), Tile(64, 4, 1), Tile(32, 4, 1), Tile(64, 4, 1)),
    (2, 64): LaunchTable(((1, 1), (2, 2), (4, 4)), Tile(64, 4, 1), Tile(32, 4, 1), Tile(64, 4, 1)),
    (2, 128): LaunchTable(((1, 2), (4, 4)), Tile(64, 8, 1), Tile(32, 4, 1), Tile(32, 4, 1)),
    (4, 32): LaunchTable(((2, 4), (4, 8)), Tile(32, 8, 1), Tile(32, 8, 1), Tile(32, 8, 1)),
    (4, 64): LaunchTable(((2, 4), (4, 8)), Tile(16, 4, 1), Tile(16, 4, 1), Tile(16, 4, 1)),
    (4, 128): LaunchTable(((4, 8),), Tile(16, 4, 1), Tile(16, 8, 1), Tile(16, 8, 1)),
}


def attention_forward(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v within each sentence, the probabilities dropped with probability p.

    qkv [N, 3, h, d] (any row stride; fp32, bf16 or fp16), cu_seqlens [B + 1] int32, seed [1] int64, mask [N] bool or
    None. Returns out [N, h * d] and lse [h, N] fp32. Rows of no sentence are zero, and so is what attends to nothing.
    Raises ValueError for a head_dim above 128, an unsupported dtype, or dropout without a seed.
    """
    check_probability(p, seed)
    qkv = _with_packed_rows(qkv)
    rows, _, heads, width = qkv.shape
    sentences = cu_seqlens.numel() - 1
    if sentences == 0 or rows == 0:
        return qkv.new_zeros(rows, heads * width), qkv.new_zeros(heads, rows, dtype=torch.float32)
    out = torch.empty(rows, heads * width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=qkv.device)
    tensors = (qkv, out, lse, cu_seqlens, mask, seed if p else None)
    table, constants = _table(qkv), _constants(qkv, p)
    tiles, (warps, _) = _short_tiles(table, max_seqlen)
    short_forward[(sentences * heads,)](
        *tensors, rows, sentences, heads, qkv.stride(0), scale, site,
        TILES=tiles, num_warps=warps, num_stages=1, **constants,
    )  # fmt: skip
    if max_seqlen > table.longest_short:
        tile = table.forward
        tiled_forward[(_programs(qkv, tile, table.longest_short),)](
            *tensors, rows, sentences, heads, table.longest_short, qkv.stride(0), scale, site,
            T=tile.tokens, num_warps=tile.warps, num_stages=tile.stages, **constants,
            **all_registers(qkv.device, tile.warps),
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """dqkv [N, 3, h, d] from dout [N, h * d] (any row stride) and what the forward took and returned.

    Deterministic: each gradient is summed by one program in a fixed order. Rows of no sentence are zero.
    """
    check_probability(p, seed)
    qkv = _with_packed_rows(qkv)
    dout = dout if dout.stride(1) == 1 else dout.contiguous()
    rows, _, heads, _ = qkv.shape
    sentences = cu_seqlens.numel() - 1
    if sentences == 0 or rows == 0:
        return torch.zeros(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    seed = seed if p else None
    table, constants = _table(qkv), _constants(qkv, p)
    tiles, (_, warps) = _short_tiles(table, max_seqlen)
    short_backward[(sentences * heads,)](
        dout, qkv, lse, dqkv, cu_seqlens, mask, seed,
        rows, sentences, heads, dout.stride(0), qkv.stride(0), scale, site,
        TILES=tiles, num_warps=warps, num_stages=1, **constants,
    )  # fmt: skip
    if max_seqlen > table.longest_short:
        for kernel, tile in (
            (tiled_backward_keys, table.backward_keys),
            (tiled_backward_queries, table.backward_queries),
        ):
            kernel[(_programs(qkv, tile, table.longest_short),)](
                dout, qkv, out, lse, dqkv, cu_seqlens, mask, seed,
                rows, sentences, heads, table.longest_short, dout.stride(0), qkv.stride(0), scale, site,
                T=tile.tokens, num_warps=tile.warps, num_stages=tile.stages, **constants,
                **all_registers(qkv.device, tile.warps),
            )  # fmt: skip
    return dqkv


def attention_dense_forward(
    qkv: Tensor, mask: Tensor, scale: float, p: float = 0.0, seed: Tensor | None = None, site: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention on a rectangle: qkv [B, S, 3, h, d], mask [B, S], nonzero where a position is attended, anywhere.

    Returns out [B, S, h * d] and lse [h, B * S]. Queries with mask 0, and rows that attend to nothing, give zeros.
    """
    batch, length = mask.shape
    out, lse = attention_forward(*_as_packed(qkv, mask), length, scale, p, seed, site, _as_bytes(mask))
    return out.view(batch, length, -1), lse


def attention_dense_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """dqkv [B, S, 3, h, d] from dout [B, S, h * d] and what the forward took and returned."""
    packed, offsets = _as_packed(qkv, mask)
    flat, length = out.flatten(0, 1), mask.shape[1]
    dqkv = attention_backward(
        dout.reshape(flat.shape), packed, flat, lse, offsets, length, scale, p, seed, site, _as_bytes(mask)
    )
    return dqkv.view(qkv.shape)


@triton.jit
def _dropout_factors(out_ptr, seed_ptr, site, rows, length, P: tl.constexpr, K: tl.constexpr):
    row, head = tl.program_id(0) * 64 + tl.arange(0, 64), tl.program_id(1)
    key = tl.arange(0, K)
    keeps = dropout_keeps(seed_ptr, site, head, row, 0, K, P)
    position = (head * rows + row).to(tl.int64)[:, None] * length + key[None, :]
    mask = (row < rows)[:, None] & (key < length)[None, :]
    tl.store(out_ptr + position, tl.where(keeps != 0, 1.0 / (1.0 - P), 0.0), mask=mask)


def attention_dropout_mask(rows: int, heads: int, max_seqlen: int, p: float, seed: Tensor, site: int = 0) -> Tensor:
    """The factors that attention multiplies its probabilities with: 0 or 1 / (1 - p), fp32 [h, N, max_seqlen].

    Element [head, row, key] belongs to query row `row` of the packed batch (b * S + s of a rectangle) and to key number
    `key` of its sentence; it depends on these, the seed and the site alone. For tests.
    """
    factors = torch.empty(heads, rows, max_seqlen, dtype=torch.float32, device=seed.device)
    keys = max(4, triton.next_power_of_2(max_seqlen))
    grid = (triton.cdiv(rows, 64), heads)
    _dropout_factors[grid](factors, seed, site, rows, max_seqlen, P=p, K=keys, enable_fp_fusion=True)
    return factors


def _with_packed_rows(qkv: Tensor) -> Tensor:
    """qkv with its [3, h, d] of a row side by side; rows may lie any distance apart."""
    _, three, heads, width = qkv.shape
    if three != 3 or width > WIDEST_HEAD:
        raise ValueError(f"qkv must be [N, 3, heads, head_dim] with head_dim up to {WIDEST_HEAD}, got {(*qkv.shape,)}")
    if qkv.dtype not in _TYPES:
        raise ValueError(f"attention runs in float32, bfloat16 or float16, not {qkv.dtype}")
    return qkv if qkv.stride()[1:] == (heads * width, width, 1) else qkv.contiguous()


def _as_packed(qkv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rectangle as packed rows: qkv [B * S, 3, h, d], offsets [B + 1]."""
    batch, length = mask.shape
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device) * length
    return qkv.flatten(0, 1), offsets


def _as_bytes(mask: Tensor) -> Tensor:
    return (mask != 0).view(torch.uint8).flatten()


def _constants(qkv: Tensor, p: float) -> dict[str, Any]:
    """Compile-time arguments that all kernels take."""
    width = qkv.shape[3]
    compute = _TYPES[qkv.dtype]
    if triton.knobs.runtime.interpret and qkv.dtype == torch.bfloat16:
        compute = tl.float32  # the interpreter multiplies bf16's raw bits
    return {
        "HEAD_DIM": width,
        "D": max(16, triton.next_power_of_2(width)),
        "P": p,
        "COMPUTE": compute,
        "PRECISION": "ieee",
        "enable_fp_fusion": True,
    }


def _table(qkv: Tensor) -> LaunchTable:
    return _TABLES[qkv.element_size(), max(32, triton.next_power_of_2(qkv.shape[3]))]


def _short_tiles(table: LaunchTable, max_seqlen: int) -> tuple[int, tuple[int, int]]:
    """How many tile sizes (16, 32, ...) of the short kernels sentences up to max_seqlen tokens need, and the warps."""
    tiles = min(len(table.short), max(1, (max_seqlen - 1).bit_length() - 3))
    return tiles, table.short[tiles - 1]


def _programs(qkv: Tensor, tile: Tile, above: int) -> int:
    """Programs of a tiled kernel: two a multiprocessor, but no more than there can be (tile, head) pairs."""
    rows, _, heads, _ = qkv.shape
    return min(2 * multiprocessors(qkv.device), (rows // tile.tokens + rows // (above + 1) + 1) * heads)


def launches() -> Iterator[Launch]:
    """Every row of the launch tables, with dropout (the larger kernels): 2,816 rows of 12 heads, bf16 and fp32."""
    offsets = torch.empty(161, dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        for width in (32, 64, 128):
            qkv = torch.empty(2816, 3, 12, width, dtype=dtype, device="meta")
            out = torch.empty(2816, 12 * width, dtype=dtype, device="meta")
            lse = torch.empty(12, 2816, device="meta")
            table = _table(qkv)
            for longest in [16 << tile for tile in range(len(table.short))] + [2 * table.longest_short]:
                shape = f"{name} head_dim {width}, {longest} tokens"
                rest = (offsets, longest, width**-0.5, 0.1, seed, 5)
                yield Launch(f"forward {shape}", partial(attention_forward, qkv, *rest))
                yield Launch(f"backward {shape}", partial(attention_backward, out, qkv, out, lse, *rest))
    dense = torch.empty(32, 128, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(32, 128, dtype=torch.bool, device="meta")
    yield Launch("dense forward bfloat16 head_dim 64", partial(attention_dense_forward, dense, mask, 0.125))
    out, lse = torch.empty(32, 128, 768, dtype=torch.bfloat16, device="meta"), torch.empty(12, 4096, device="meta")
    yield Launch(
        "dense backward bfloat16 head_dim 64", partial(attention_dense_backward, out, dense, out, lse, mask, 0.125)
    )
