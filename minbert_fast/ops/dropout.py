# SPDX-License-Identifier: Apache-2.0
"""The dropout masks of kernels/dropout.py in plain PyTorch: the same Philox4x32-7, the same numbers, on any device.

There is no generator state, and no value is read from the device. A backward draws its forward's mask again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.ops.segments import statistics_dtype

_ROUNDS = 7
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(key: Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 with seven rounds (Salmon et al. 2011). Words are int64 in [0, 2^32); `key` is one int64, any sign."""
    a, b, c, d = counter
    low, high = key & _LOW, (key >> 32) & _LOW
    for _ in range(_ROUNDS):
        # An int64 product of two 32-bit words wraps, but its 64 bits are the right ones.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((second >> 32) & _LOW) ^ b ^ low, second & _LOW
        c, d = ((first >> 32) & _LOW) ^ d ^ high, first & _LOW
        low, high = (low + _KEY_STEPS[0]) & _LOW, (high + _KEY_STEPS[1]) & _LOW
    return a, b, c, d


def check(p: float, seed: Tensor | None) -> None:
    """Raises ValueError unless p is a dropout probability in [0, 1) and has a seed if it is not 0."""
    if not 0.0 <= p < 1.0 or (p > 0.0 and seed is None):
        raise ValueError(f"dropout needs 0 <= p < 1 and, where p > 0, a seed: p is {p}, seed is {seed}")


def keep_rows(seed: Tensor | None, site: int, rows: int, like: Tensor, p: float) -> Tensor:
    """`keep_mask` of rows 0 to `rows` for as many columns as `like` has, in its dtype of statistics.

    Ones [rows, 1] without dropout.
    """
    dtype = statistics_dtype(like.dtype)
    if p == 0.0:
        return like.new_ones(rows, 1, dtype=dtype)
    assert seed is not None
    return keep_mask(seed, site, torch.arange(rows, device=like.device), like.shape[1], p).to(dtype)


def keep_mask(seed: Tensor, site: int, rows: Tensor, columns: int, p: float, plane: int = 0) -> Tensor:
    """The dropout factors of elements (plane, rows[i], 0..columns): 0 with probability p, else 1 / (1 - p).

    `seed` int64 [1], `rows` integers [R] on the same device -> fp32 [R, columns].
    """
    row = rows.long()[:, None]
    quad = torch.arange((columns + 3) // 4, device=rows.device)[None, :]
    zero = torch.zeros_like(row + quad)
    words = philox(seed.reshape(()), (zero + quad, zero + row, zero + plane, zero + site))
    word = torch.stack(words, -1).reshape(len(rows), 4 * quad.shape[1])[:, :columns]
    return (word >= int(p * 2**32)).to(torch.float32) / (1.0 - p)
