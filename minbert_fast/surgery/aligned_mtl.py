# SPDX-License-Identifier: Apache-2.0
"""Aligned-MTL: the mean of the gradients after every principal component is scaled to the weakest one.

    >>> weights(np.diag([1.0, 4.0]))
    array([0.5 , 0.25])

    w = V diag(sqrt(min(s) / s)) V^T 1/T    where G = V diag(s) V^T

Senushkin et al. 2023, arXiv:2305.19000.
"""

from __future__ import annotations

import numpy as np

from minbert_fast.surgery.base import Array
from minbert_fast.surgery.solvers import components


def weights(gram: Array) -> Array:
    """w [T] from G [T, T]."""
    values, vectors = components(gram)
    mean = np.full(len(gram), 1 / len(gram))
    balanced: Array = vectors @ (np.sqrt(values.min() / values) * (vectors.T @ mean))
    return balanced
