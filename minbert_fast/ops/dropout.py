# SPDX-License-Identifier: Apache-2.0
"""The dropout masks of kernels/dropout.py in plain PyTorch: the same Philox4x32-7, the same numbers, on any device.

No generator state and no question to the device, so a backward draws its forward's mask again.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        a, b, c, d = (
            ((second >> 32) & _LOW) ^ b ^ low,
            second & _LOW,
            ((first >> 32) & _LOW) ^ d ^ high,
            first & _LOW,
        )
        low, high = (low + _KEY_STEPS[0]) & _LOW, (high + _KEY_STEPS[1]) & _LOW
    return a, b, c, d


def keep_mask(seed: Tensor, site: int, rows: Tensor, columns: int, p: float, plane: int = 0) -> Tensor:
    """What dropout multiplies elements (plane, rows[i], 0..columns) with: 0 with probability p, else 1 / (1 - p).

    `seed` int64 [1], `rows` integers [R] on the same device -> fp32 [R, columns].
    """
    row = rows.long()[:, None]
    quad = torch.arange((columns + 3) // 4, device=rows.device)[None, :]
    zero = torch.zeros_like(row + quad)
    words = philox(seed.reshape(()), (zero + quad, zero + row, zero + plane, zero + site))
    word = torch.stack(words, -1).reshape(len(rows), 4 * quad.shape[1])[:, :columns]
    return (word >= int(p * 2**32)).to(torch.float32) / (1.0 - p)
