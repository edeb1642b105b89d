# SPDX-License-Identifier: Apache-2.0
"""The index of a search: sentences with their vectors, and the nearest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Hit(NamedTuple):
    """A search result."""

    row: int  # in the corpus, from 0
    score: float  # cosine
    text: str


@dataclass(frozen=True, repr=False)
class Index:
    """Sentences and their vectors, for repeated searches."""

    texts: Sequence[str]
    vectors: np.ndarray  # [n, H] fp32, of length 1

    def __repr__(self) -> str:
        return f"Index({len(self.texts):,} sentences, vectors of {self.vectors.shape[1]})"

    def nearest(self, vectors: np.ndarray, top: int) -> list[list[Hit]]:
        """The `top` sentences of the highest cosine, best first, for each of `vectors` [q, H] of length 1.

        Fewer if there are no more. Raises ValueError for a `top` that is no whole number from 0.
        """
        if not isinstance(top, int | np.integer) or top < 0:
            raise ValueError(f"top is {top!r}, expected a whole number, 0 or more")
        top = min(int(top), len(self.texts))
        if not top:
            return [[] for _ in vectors]
        found = []
        for begin in range(0, len(vectors), 256):  # limits the memory of the scores
            for scores in vectors[begin : begin + 256] @ self.vectors.T:
                best = np.flatnonzero(-scores <= np.partition(-scores, top - 1)[top - 1])  # more than `top` if equal
                best = best[np.argsort(-scores[best], kind="stable")][:top]  # of equal scores, the earlier sentence
                found.append([Hit(i, float(scores[i]), self.texts[i]) for i in best.tolist()])
        return found
