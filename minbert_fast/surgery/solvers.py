# SPDX-License-Identifier: Apache-2.0
"""The small optimization problems of some surgery methods, solved on the host in fp64.

Each public function maps the Gram matrix G [T, T] of the tasks' gradients to weights [T] of their average. All are
invariant to the scale of G; callers scale it to a largest square of 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TOLERANCE = 1e-12  # of optimality, against a largest square of 1


def upgrad(gram: Array) -> Array:
    """UPGrad (Quinton & Rey 2024, arXiv:2406.16232): the mean of the gradients, each projected onto the dual cone.

    Task i's projection minimizes v G v over v >= e_i. With v = e_i + z that is a non-negative least-squares problem.
    """
    tasks = len(gram)
    units = np.eye(tasks)
    mean: Array = np.mean([unit + nonnegative(gram, -gram @ unit) for unit in units], axis=0)
    return mean


def mgda(gram: Array) -> Array:
    """MGDA (Désidéri 2012): the shortest vector in the convex hull of the gradients.

    min a G a over the simplex has the same optimality conditions as min a (G + 11^T) a - 2 sum(a) over a >= 0, up to
    the length of a.
    """
    a = nonnegative(gram + 1.0, np.ones(len(gram)))
    shares: Array = a / a.sum()
    return shares


def cagrad(gram: Array, c: float = 0.5) -> Array:
    """CAGrad (Liu et al. 2021, arXiv:2110.14048): the mean gradient g, moved by at most c |g| towards the worst task.

    The dual problem, min over the simplex of a G 1/T + c |g| sqrt(a G a), by projected gradient descent. Weights are
    zero at a stationary point, where no combination helps every task.
    """
    tasks = len(gram)
    mean = np.full(tasks, 1 / tasks)
    towards = gram @ mean
    radius = c * math.sqrt(max(float(mean @ towards), 0.0))

    def length(a: Array) -> float:
        return math.sqrt(max(float(a @ gram @ a), 0.0))

    def cost(a: Array) -> float:
        return float(a @ towards) + radius * length(a)

    a, rate = mean, 1.0
    for _ in range(2000):
        norm = length(a)
        if norm < _TOLERANCE:
            break
        slope = towards + radius * (gram @ a) / norm
        while True:
            following = onto_simplex(a - rate * slope)
            move = following - a
            if rate < 1e-12 or cost(following) <= cost(a) + 0.5 * slope @ move:
                break
            rate /= 2
        a, rate = following, rate * 1.5
        if np.abs(move).max() < _TOLERANCE:
            break
    norm = length(a)
    return np.add(mean, radius / norm * a) if norm > 1e-6 else np.zeros(tasks)


def aligned_mtl(gram: Array) -> Array:
    """Aligned-MTL (Senushkin et al. 2023): the mean after every principal component is scaled to the weakest one."""
    tasks = len(gram)
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * tasks * np.finfo(np.float32).eps  # G was summed in fp32
    mean = np.full(tasks, 1 / tasks)
    if not kept.any():
        return mean
    values, vectors = values[kept], vectors[:, kept]
    balanced: Array = vectors @ (np.sqrt(values.min() / values) * (vectors.T @ mean))
    return balanced


def nonnegative(gram: Array, linear: Array) -> Array:
    """z >= 0 that minimizes z G z / 2 - linear z, for G positive semidefinite.

    Lawson & Hanson's active-set method (Solving Least Squares Problems, 1974, chapter 23) on the normal equations.
    """
    size = len(gram)
    z = np.zeros(size)
    free = np.zeros(size, dtype=bool)
    for _ in range(10 * size):
        slope = linear - gram @ z
        slope[free] = -np.inf
        best = int(np.argmax(slope))
        if slope[best] <= _TOLERANCE * size:
            return z
        free[best] = True
        while True:
            trial = np.zeros(size)
            trial[free] = np.linalg.lstsq(gram[np.ix_(free, free)], linear[free], rcond=None)[0]
            leaving = free & (trial <= 0)
            if not leaving.any():
                break
            ratio = np.min(z[leaving] / (z[leaving] - trial[leaving]), initial=1.0)
            z = z + ratio * (trial - z)
            free &= z > _TOLERANCE
            z[~free] = 0
            if not free.any():
                trial = z
                break
        z = trial
    return z


def onto_simplex(y: Array) -> Array:
    """The point of the simplex (non-negative, sum 1) nearest to y. Held, Wolfe & Crowder 1974."""
    descending = np.sort(y)[::-1]
    excess = (np.cumsum(descending) - 1) / np.arange(1, len(y) + 1)
    nearest: Array = np.maximum(y - excess[np.flatnonzero(descending > excess)[-1]], 0)
    return nearest
