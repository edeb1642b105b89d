# SPDX-License-Identifier: Apache-2.0
"""Tests for a few runs compared in pairs by seed: Student's t test, and Holm's correction for several tests (Holm 1979)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def paired_t_test(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of paired differences against a mean of 0 (Student 1908), with n - 1 degrees of freedom.

    None for fewer than two differences, or where all are equal and not 0: their spread is unknown. 1 where all are 0.
    """
    if len(differences) < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return 1.0 if mean == 0 else None
    return student_tail(mean / (spread / math.sqrt(len(differences))), len(differences) - 1)


def student_tail(t: float, freedom: int) -> float:
    """P(|T| > |t|) for Student's T with a whole number of degrees of freedom, 1 or more.

    The finite series of Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(abs(t), math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):  # (freedom - odd) / 2 terms
        total += term
        term *= cosine * cosine * (k - 1) / k
    if odd:
        return max(0.0, 1 - 2 / math.pi * (angle + sine * total))
    return max(0.0, 1 - sine * total)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for the number of tests: rejecting those below a level keeps the family-wise error rate below it."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
