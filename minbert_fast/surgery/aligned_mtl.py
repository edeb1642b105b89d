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


def weights(gram: Array) -> Array:
    """w [T] from G [T, T]. Components that rounding alone explains are left out."""
    tasks = len(gram)
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * tasks * np.finfo(np.float32).eps  # G was summed in fp32
    mean = np.full(tasks, 1 / tasks)
    if not kept.any():
        return mean
    values, vectors = values[kept], vectors[:, kept]
    balanced: Array = vectors @ (np.sqrt(values.min() / values) * (vectors.T @ mean))
    return balanced
