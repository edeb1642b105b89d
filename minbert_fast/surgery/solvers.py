# SPDX-License-Identifier: Apache-2.0
"""Small problems that several methods share, solved on the host in fp64."""

from __future__ import annotations

import numpy as np

from minbert_fast.surgery.base import Array

TOLERANCE = 1e-12  # of optimality, against a largest square of 1


def nonnegative(gram: Array, linear: Array) -> Array:
    """z >= 0 that minimizes z G z / 2 - linear z, for G positive semidefinite and linear not 0.

    Lawson & Hanson's active-set method (Solving Least Squares Problems, 1974, chapter 23) on the normal equations. The
    unknowns are scaled to a diagonal of 1 first, so that gradients of any length count.
    """
    size = len(gram)
    scale = np.sqrt(gram.diagonal())
    scale[scale == 0] = 1.0
    gram, linear = gram / np.outer(scale, scale), linear / scale
    linear = linear / (largest := np.abs(linear).max())
    z = np.zeros(size)
    free = np.zeros(size, dtype=bool)
    for _ in range(10 * size):
        slope = linear - gram @ z
        slope[free] = -np.inf
        best = int(np.argmax(slope))
        if slope[best] <= TOLERANCE * size:
            break
        free[best] = True
        while True:
            trial = np.zeros(size)
            trial[free] = np.linalg.lstsq(gram[np.ix_(free, free)], linear[free], rcond=None)[0]
            leaving = free & (trial <= 0)
            if not leaving.any():
                break
            ratio = np.min(z[leaving] / (z[leaving] - trial[leaving]), initial=1.0)
            z = z + ratio * (trial - z)
            free &= z > TOLERANCE
            z[~free] = 0
            if not free.any():
                trial = z
                break
        z = trial
    solution: Array = z * largest / scale
    return solution


def shortest(gram: Array) -> Array:
    """The a of the simplex (a >= 0, sum(a) = 1) that minimizes a^T G a.

    min a^T (G + s 11^T) a - 2 sum(a) over a >= 0 has the same optimality conditions for any s > 0, up to the length of a.
    With the smallest square as s, neither term is lost beside the other.
    """
    a = nonnegative(gram + max(gram.diagonal().min(), 1e-30), np.ones(len(gram)))
    shares: Array = a / a.sum()
    return shares


def components(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues [k], ascending, and eigenvectors [T, k] of G, without those that rounding alone explains.

    G's entries were rounded to fp32, each relative to the lengths of its own two gradients. So a component of gradients
    that are much shorter than the others can be exact.
    """
    values, vectors = np.linalg.eigh(gram)
    rounded = np.finfo(np.float32).eps * (gram.diagonal() @ vectors**2)
    kept = values > len(gram) * np.maximum(rounded, np.finfo(np.float64).eps * values[-1])
    return values[kept], vectors[:, kept]
