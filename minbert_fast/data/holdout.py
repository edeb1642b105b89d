# SPDX-License-Identifier: Apache-2.0
"""A dev set from training rows, for a task that names none."""

from __future__ import annotations

import numpy as np

from minbert_fast.data.sampling import philox
from minbert_fast.data.tokens import TokenTable

MAX_GROUPS = 1000  # labels with more different values are not classes


def hold_out(table: TokenTable, share: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows of a table at random: numbers of the rows to train on, and of those held out, both ascending.

    Labels that are whole numbers with few values are classes: each is held out in proportion, and keeps a row to train on.
    The split depends on the table's size, its labels, `share` and `seed` alone. Raises ValueError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share = {share}: expected 0 < share < 1")
    count = len(table)
    order = np.argsort(philox(seed, "hold-out", 0, 0).random_raw(count), kind="stable")
    groups = _groups(table.labels)
    if groups is None:
        candidates = order
    else:
        order = order[np.argsort(groups[order], kind="stable")]  # class after class, each in random order
        candidates = order[np.diff(groups[order], prepend=-1) == 0]  # all but the first row of each class
    wanted = min(max(1, round(share * count)), len(candidates), max(0, count - 1))
    every = ((np.arange(wanted) + 0.5) * (len(candidates) / max(1, wanted))).astype(np.int64)
    held = np.zeros(count, dtype=bool)
    held[candidates[every]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _groups(labels: np.ndarray | None) -> np.ndarray | None:
    """The class of each row, from 0; None for labels that are no classes."""
    if labels is None or labels.ndim > 1 or not np.array_equal(labels, np.round(labels)):
        return None
    values, groups = np.unique(labels, return_inverse=True)
    return groups if len(values) <= min(MAX_GROUPS, max(2, len(labels) // 2)) else None
