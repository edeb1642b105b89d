# SPDX-License-Identifier: Apache-2.0
"""Which of the processes that train together this one is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Rank of this process among `size`. Rank 0 alone writes files and shows progress."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0
