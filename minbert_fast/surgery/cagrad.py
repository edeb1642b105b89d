# SPDX-License-Identifier: Apache-2.0
"""CAGrad: the best for the worst-off task within c |g| of the mean gradient g (Liu et al. 2021, arXiv:2110.14048).

    >>> weights(np.diag([0.25, 1.0])).round(3)
    array([1.059, 0.5  ])

    a = argmin a^T G 1/T + c |g| sqrt(a^T G a) over the simplex,    w = 1/T + c |g| / sqrt(a^T G a) a

Weights are zero at a stationary point: where g or a J is zero, no direction within the ball helps every task.
"""

from __future__ import annotations

import math

import numpy as np

from minbert_fast.surgery.base import Array
from minbert_fast.surgery.solvers import shortest


def weights(gram: Array, c: float = 0.5) -> Array:
    """w [T] from G [T, T], whose largest square is 1.

    Since |x| = min over s of (s + |x|^2 / s) / 2, a J + (s / c|g|) g is the shortest combination of the g_i + (s / c|g|) g,
    for the s that equals |a J|. |a J| / s falls with s, so regula falsi (with the Illinois rule) on its logarithm finds s.
    """
    w = np.zeros(len(gram))
    mean = np.full(len(gram), 1 / len(gram))
    towards = gram @ mean
    square = max(float(mean @ towards), 0.0)
    radius = c * math.sqrt(square)
    lengths = np.sqrt(gram.diagonal())
    if radius <= 1e-6 * (mean @ lengths):  # the mean itself is zero, but for rounding
        return w

    def found(logarithm: float) -> tuple[Array, float, float]:
        """a for s, |a J|, and log(|a J| / s)."""
        shift = math.exp(logarithm) / radius
        a = shortest(gram + shift * (towards[:, None] + towards) + shift**2 * square)
        norm = math.sqrt(max(float(a @ gram @ a), 1e-30))
        return a, norm, math.log(norm) - logarithm

    low, high = math.log(1e-7 * lengths.min()), math.log(lengths.max())
    a, norm, at_high = found(high)
    at_low = found(low)[2]
    if at_low <= 0:  # |a J| is zero, but for rounding
        return w
    side = 0
    for _ in range(60):
        if abs(at_high) < 1e-12 or high - low < 1e-12:
            break
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        a, norm, value = found(middle)
        if abs(value) < 1e-10:
            break
        if value > 0:
            low, at_low, at_high = middle, value, at_high / 2 if side > 0 else at_high
            side = 1
        else:
            high, at_high, at_low = middle, value, at_low / 2 if side < 0 else at_low
            side = -1
    if norm > 1e-6 * (a @ lengths):  # else the gradients cancel out
        w = mean + radius / norm * a
    return w
