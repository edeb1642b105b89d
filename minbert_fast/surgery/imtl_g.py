# SPDX-License-Identifier: Apache-2.0
"""IMTL-G: the combination whose projection on every gradient is equally long (Liu et al. 2021, ICLR, IMTL-G).

    >>> weights(np.diag([0.25, 1.0])).round(3)
    array([0.667, 0.333])

    v = pinv(G) d,    d_i = sqrt(G_ii),    w = v / sum(v)

The pseudo-inverse extends it to dependent gradients (Quinton & Rey 2024, arXiv:2406.16232). Weights may be negative.
They are zero where sum(v) is, for example for two gradients g and -g.
"""

from __future__ import annotations

import numpy as np

from minbert_fast.surgery.base import Array
from minbert_fast.surgery.solvers import components


def weights(gram: Array) -> Array:
    """w [T] from G [T, T]."""
    values, vectors = components(gram)
    v = vectors @ (vectors.T @ np.sqrt(gram.diagonal()) / values)
    total = v.sum()
    shares: Array = v / total if abs(total) > 1e-6 * np.abs(v).max() else np.zeros(len(gram))
    return shares
