# SPDX-License-Identifier: Apache-2.0
"""MGDA: the shortest vector in the convex hull of the gradients (Désidéri 2012; Sener & Koltun 2018, arXiv:1810.04650).

>>> weights(np.diag([1.0, 4.0]))
array([0.8, 0.2])

w = argmin a^T G a over the simplex (a >= 0, sum(a) = 1)
"""

from __future__ import annotations

from minbert_fast.surgery.base import Array
from minbert_fast.surgery.solvers import shortest


def weights(gram: Array) -> Array:
    """w [T] from G [T, T]."""
    return shortest(gram)
