# SPDX-License-Identifier: Apache-2.0
"""UPGrad: the mean of the gradients, each projected onto the dual cone (Quinton & Rey 2024, arXiv:2406.16232).

    >>> J = np.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> weights(J @ J.T)
    array([1.  , 0.75])

    w = 1/T sum_i argmin v^T G v over v >= e_i

The dual cone holds the directions that conflict with no task.
"""

from __future__ import annotations

import numpy as np

from minbert_fast.surgery.base import Array
from minbert_fast.surgery.solvers import nonnegative


def weights(gram: Array) -> Array:
    """w [T] from G [T, T]. With v = e_i + z, each minimum is a non-negative least-squares problem in z."""
    mean: Array = np.mean([unit + nonnegative(gram, -gram @ unit) for unit in np.eye(len(gram))], axis=0)
    return mean
