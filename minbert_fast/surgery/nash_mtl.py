# SPDX-License-Identifier: Apache-2.0
"""Nash-MTL: the tasks' Nash bargaining solution (Navon et al. 2022, arXiv:2202.01017).

    >>> weights(np.diag([0.25, 1.0])).round(3)
    array([1. , 0.5])

    G a = 1 / a for a > 0,    w = a / T

The paper's a adds the gradients, so it is what reduction "sum" gives, of a G whose largest square is 1: without that scale
the step would not depend on the gradients' lengths.
"""

from __future__ import annotations

import numpy as np

from minbert_fast.surgery.base import Array

_RIDGE = 1e-7  # keeps the solution finite where gradients are opposite: fp32's rounding of a cosine


def weights(gram: Array) -> Array:
    """w [T] from G [T, T].

    With b_i = a_i |g_i| the problem is min b^T C b / 2 - sum(log b) over the cosines C. It is convex and
    self-concordant, so damped Newton steps converge from anywhere.
    """
    tasks = len(gram)
    lengths = np.sqrt(gram.diagonal())
    cosines = gram / np.outer(lengths, lengths) + _RIDGE * np.eye(tasks)
    b = np.ones(tasks)
    for _ in range(200):
        slope = cosines @ b - 1 / b
        step = np.linalg.solve(cosines + np.diag(1 / b**2), slope)
        decrement = np.sqrt(max(float(slope @ step), 0.0))
        b = b - step / (1 + decrement if decrement > 0.25 else 1)
        if decrement < 1e-10:
            break
    w: Array = b / lengths / tasks
    return w
