# SPDX-License-Identifier: Apache-2.0
"""Dropout whose mask is never stored: a pure function of (seed, site, element), drawn again in the backward.

The generator is Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: seven rounds pass
BigCrush). Its key is the step's seed, an int64 tensor of one element on the device, advanced once a step, so that a
captured graph draws new masks at each replay. Its counter is the element: (column // 4, row, plane, site), `site`
telling the dropouts of one step apart, and column % 4 choosing one of the four words of a draw. No number can
overflow 32 bits. A draw for each element would take longer than reading the element from memory, so one draw serves four.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(7)


@triton.jit
def keep_scale_quads(seed, site, row, quad, p: tl.constexpr):
    """The dropout factors of elements: 0 where a word is in the lowest fraction p, else 1 / (1 - p); fp32 [R, 4 C].

    `seed` int64 (loaded); `site` int32; row [R, 1] and quad [1, C] int32. Columns 4 c to 4 c + 3 of the result are the
    elements of columns 4 quad[c] to 4 quad[c] + 3.
    """
    zero = (row + quad) * 0
    a, b, c, d = tl.philox(seed, zero + quad, zero + row, zero, zero + site, _ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [R, C, 2, 2]: the last two indices count a, b, c, d
    threshold: tl.constexpr = int(p * 4294967296.0)
    words = tl.reshape(words, (a.shape[0], a.shape[1] * 4)).to(tl.uint32, bitcast=True)
    return tl.where(words >= threshold, 1.0 / (1.0 - p), 0.0)


@triton.jit
def keep_quads(seed, site, plane, row, quad, p: tl.constexpr):
    """Where `keep_scale_quads` is not zero: int8, 1 or 0, a quarter of the bytes where the tile must change layout."""
    zero = (plane + row + quad) * 0
    a, b, c, d = tl.philox(seed, zero + quad, zero + row, zero + plane, zero + site, _ROUNDS)
    threshold: tl.constexpr = int(p * 4294967296.0)
    a, b = (a >= threshold).to(tl.int8), (b >= threshold).to(tl.int8)
    c, d = (c >= threshold).to(tl.int8), (d >= threshold).to(tl.int8)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], a.shape[1] * 4))
