# SPDX-License-Identifier: Apache-2.0
"""Masked multi-head self-attention on packed tokens: launchers of the short and the tiled kernels, and which runs when.

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

from minbert_fast.common.side_stream import forked
from minbert_fast.kernels.arguments import TYPES, all_registers, is_hopper_or_newer, multiprocessors, next_power_of_2
from minbert_fast.kernels.attention_short import short_backward, short_forward
from minbert_fast.kernels.attention_tiled import tiled_backward, tiled_forward
from minbert_fast.kernels.launches import Launch, meta

WIDEST_HEAD = 128


@dataclass(frozen=True)
class LaunchTable:
    """How attention runs for one element size and head_dim."""

    short: tuple[tuple[int, int], ...]  # warps (forward, backward) of the short kernels with tiles up to 16, 32, ...
    forward: tuple[int, int]  # longer sentences: tokens of a tile, warps
    backward: tuple[int, int, int]  # tokens of a tile of keys, of a tile of queries, warps

    @property
    def longest_short(self) -> int:
        """Tokens of the longest sentence that a short kernel takes."""
        return 8 << len(self.short)


# By (bytes of an element, D). Chosen from registers and shared memory as the ahead-of-time check prints them: nothing
# spills on any chip, and a multiprocessor holds as many programs as that allows. Measured on an H100: the warps of bf16's
# tiles of 32 and 64. (fp32 has smaller tiles because NVIDIA's matrix units cannot multiply it in full precision.)
_TABLES: dict[tuple[int, int], LaunchTable] = {
    (2, 32): LaunchTable(((1, 1), (2, 2), (4, 4)), (64, 4), (32, 64, 4)),
    (2, 64): LaunchTable(((1, 1), (1, 2), (4, 4)), (64, 4), (32, 32, 4)),
    (2, 128): LaunchTable(((1, 2), (4, 4)), (64, 8), (32, 32, 4)),
    (4, 32): LaunchTable(((2, 4), (4, 8)), (32, 8), (32, 32, 8)),
    (4, 64): LaunchTable(((2, 4), (4, 8)), (16, 4), (16, 16, 4)),
    (4, 128): LaunchTable(((4, 8),), (16, 4), (16, 16, 8)),
}


def attention_forward(
    qkv: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, max_seqlen: int, scale: float,
    p: float, seed: Tensor | None, site: int, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """softmax(q k^T scale) v within each sentence, the probabilities dropped with probability p.

    qkv [N, 3, h, d] (any row stride; fp32, bf16 or fp16), seed [1] int64. Sentences are cu_seqlens [B + 1] int32, or the
    rows of a rectangle: mask [B, S] bool, true where a position is attended; with it, cu_seqlens
    are [0, S, 2S, ...] (None: made here). Writes out [N, h * d] and lse [h, N] fp32.
    Rows of no sentence and rows that attend to nothing are zero. Raises ValueError for a head_dim above 128.
    """
    rows, _, heads, _ = qkv.shape
    cu_seqlens, mask = _sentences(qkv, cu_seqlens, mask)
    sentences = cu_seqlens.numel() - 1
    if sentences == 0 or rows == 0:
        out.zero_()
        lse.zero_()
        return
    tensors = (qkv, out, lse, cu_seqlens, mask, seed if p else None)
    table, constants = _table(qkv), _constants(qkv, p)
    tiles, (warps, _) = _short_tiles(table, max_seqlen)
    with forked(qkv.device) as beside:
        if max_seqlen > table.longest_short:
            tokens, long_warps = table.forward
            with beside:
                tiled_forward[(_programs(qkv, (tokens,), table.longest_short),)](
                    *tensors, rows, sentences, heads, table.longest_short, qkv.stride(0), scale, site, T=tokens,
                    num_warps=long_warps, num_stages=1, **constants, **all_registers(qkv.device, long_warps),
                )  # fmt: skip
        short_forward[(sentences * heads,)](
            *tensors, rows, sentences, heads, qkv.stride(0), scale, site,
            TILES=tiles, num_warps=warps, num_stages=1, **constants,
        )  # fmt: skip


def attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None,
    max_seqlen: int, scale: float, p: float, seed: Tensor | None, site: int, dqkv: Tensor,
) -> None:  # fmt: skip
    """Writes dqkv [N, 3, h, d] from dout [N, h * d] and what the forward took and wrote.

    Deterministic: each gradient is summed by one program in a fixed order. Rows of no sentence are zero.
    """
    rows, _, heads, _ = qkv.shape
    cu_seqlens, mask = _sentences(qkv, cu_seqlens, mask)
    sentences = cu_seqlens.numel() - 1
    if sentences == 0 or rows == 0:
        dqkv.zero_()
        return
    where = (cu_seqlens, mask, seed if p else None, rows, sentences, heads)
    table, constants = _table(qkv), _constants(qkv, p)
    tiles, (_, warps) = _short_tiles(table, max_seqlen)
    with forked(qkv.device) as beside:
        if max_seqlen > table.longest_short:
            keys, queries, long_warps = table.backward
            with beside:
                tiled_backward[(_programs(qkv, (keys, queries), table.longest_short),)](
                    dout, qkv, out, lse, dqkv, *where, table.longest_short, dout.stride(0), qkv.stride(0), scale, site,
                    KEYS=keys, QUERIES=queries, num_warps=long_warps, num_stages=1, **constants,
                    **all_registers(qkv.device, long_warps),
                )  # fmt: skip
        short_backward[(sentences * heads,)](
            dout, qkv, lse, dqkv, *where, dout.stride(0), qkv.stride(0), scale, site,
            TILES=tiles, num_warps=warps, num_stages=1, **constants, **_four_programs(qkv, tiles),
        )  # fmt: skip


def _sentences(qkv: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Offsets [B + 1] of the sentences, and the mask of attended rows [N] as bytes; a rectangle's rows lie packed."""
    if qkv.shape[3] > WIDEST_HEAD:
        raise ValueError(f"attention takes a head_dim up to {WIDEST_HEAD}, not {qkv.shape[3]}")
    if mask is None:
        assert cu_seqlens is not None
        return cu_seqlens, None
    batch, length = mask.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=qkv.device) * length
    return cu_seqlens, mask.view(torch.uint8).flatten()


def _constants(qkv: Tensor, p: float) -> dict[str, Any]:
    """Compile-time arguments that all kernels take."""
    width = qkv.shape[3]
    compute = TYPES[qkv.dtype]
    if triton.knobs.runtime.interpret and qkv.dtype == torch.bfloat16:
        compute = tl.float32  # the interpreter multiplies bf16's raw bits
    return {
        "HEAD_DIM": width, "D": max(16, next_power_of_2(width)), "P": p, "COMPUTE": compute,
        "PRECISION": "ieee", "enable_fp_fusion": True,
    }  # fmt: skip


def _table(qkv: Tensor) -> LaunchTable:
    return _TABLES[qkv.element_size(), max(32, next_power_of_2(qkv.shape[3]))]


def _short_tiles(table: LaunchTable, max_seqlen: int) -> tuple[int, tuple[int, int]]:
    """How many tile sizes (16, 32, ...) of the short kernels sentences up to max_seqlen tokens need, and the warps."""
    tiles = min(len(table.short), max(1, (max_seqlen - 1).bit_length() - 3))
    return tiles, table.short[tiles - 1]


def _four_programs(qkv: Tensor, tiles: int) -> dict[str, int]:
    """The backward's `maxnreg` by which a multiprocessor holds four programs with tiles of 64, not three.

    Triton 3.7 and later allot more registers, and would spill.
    """
    fits = tiles == 3 and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) and is_hopper_or_newer(qkv.device)
    return {"maxnreg": 128} if fits else {}


def _programs(qkv: Tensor, tiles: tuple[int, ...], above: int) -> int:
    """Programs of a tiled kernel: two a multiprocessor, but no more than there can be (tile, head) pairs."""
    rows, _, heads, _ = qkv.shape
    most = sum(rows // tokens + rows // (above + 1) + 1 for tokens in tiles)
    return min(2 * multiprocessors(qkv.device), most * heads)


def launches() -> Iterator[Launch]:
    """Every row of the launch tables, with dropout (the larger kernels): 2,816 rows of 12 heads, bf16 and fp32.

    Last, those of rectangles at BERT's head_dim, which also read a mask: in bf16 these have the largest short kernels.
    """
    offsets = meta(161, dtype=torch.int32)
    seed = meta(1, dtype=torch.int64)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        for width in (32, 64, 128):
            qkv = meta(2816, 3, 12, width, dtype=dtype)
            out = meta(2816, 12 * width, dtype=dtype)
            lse = meta(12, 2816)
            table = _table(qkv)
            for longest in [16 << tile for tile in range(len(table.short))] + [2 * table.longest_short]:
                shape = f"{name} head_dim {width}, {longest} tokens"
                rest = (offsets, None, longest, width**-0.5, 0.1, seed, 5)
                yield Launch(f"forward {shape}", partial(attention_forward, qkv, *rest, out, lse))
                yield Launch(f"backward {shape}", partial(attention_backward, out, qkv, out, lse, *rest, qkv))
    qkv, out = (meta(4096, *shape, dtype=torch.bfloat16) for shape in ((3, 12, 64), (768,)))
    lse, mask = meta(12, 4096), meta(32, 128, dtype=torch.bool)
    rest = (None, mask, 128, 0.125, 0.1, seed, 5)
    yield Launch("forward bfloat16 head_dim 64, 128 tokens dense=1", partial(attention_forward, qkv, *rest, out, lse))
    yield Launch(
        "backward bfloat16 head_dim 64, 128 tokens dense=1", partial(attention_backward, out, qkv, out, lse, *rest, qkv)
    )
