# SPDX-License-Identifier: Apache-2.0
"""CAGrad: the best for the worst-off task within c |g| of the mean gradient g (Liu et al. 2021, arXiv:2110.14048).

    >>> weights(np.diag([0.25, 1.0])).round(3)
    array([1.059, 0.5  ])

    a = argmin a^T G 1/T + c |g| sqrt(a^T G a) over the simplex,    w = 1/T + c |g| / sqrt(a^T G a) a

Weights are zero at a stationary point, where no combination helps every task.
"""

from __future__ import annotations

import math

import numpy as np

from minbert_fast.surgery.base import Array
from minbert_fast.surgery.solvers import TOLERANCE, onto_simplex


def weights(gram: Array, c: float = 0.5) -> Array:
    """w [T] from G [T, T], whose largest square is 1. Solves the problem by projected gradient descent.

    A task without a gradient, such as one without examples in the batch, is not the worst-off one: it gets weight 0.
    """
    w = np.zeros(len(gram))
    used = gram.diagonal() > 0
    if not used.any():
        return w
    gram = gram[np.ix_(used, used)]
    mean = np.full(len(gram), 1 / len(w))
    towards = gram @ mean
    radius = c * math.sqrt(max(float(mean @ towards), 0.0))

    def length(a: Array) -> float:
        return math.sqrt(max(float(a @ gram @ a), 0.0))

    def cost(a: Array) -> float:
        return float(a @ towards) + radius * length(a)

    a, rate = mean / mean.sum(), 1.0
    for _ in range(2000):
        norm = length(a)
        if norm < TOLERANCE:
            break
        slope = towards + radius * (gram @ a) / norm
        while True:
            following = onto_simplex(a - rate * slope)
            move = following - a
            if rate < 1e-12 or cost(following) <= cost(a) + 0.5 * slope @ move:
                break
            rate /= 2
        a, rate = following, rate * 1.5
        if np.abs(move).max() < TOLERANCE:
            break
    norm = length(a)
    if norm > 1e-6:
        w[used] = mean + radius / norm * a
    return w
