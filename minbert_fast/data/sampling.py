# SPDX-License-Identifier: Apache-2.0
"""Which rows each task contributes at a step: a pure function of (seed, epoch, step).

Nothing is remembered between steps, so training resumes at any step, and the steps of an epoch are known
before it begins. Orders come from the raw bits of Philox, a counter-based generator: its key is (seed,
task), its counter (epoch, pass), so that no task's order depends on which other tasks take part, nor on
NumPy's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from minbert_fast.data.tokens import TokenTable

SCHEMES = {
    "cycle": "every task at every step; short sets start anew until the longest has passed once",
    "each-once": "every task at every step until its set has passed once",
    "sequential": "one task after the other, each set once",
    "proportional": "every task at every step, in proportion to its set, so that all end together",
}


@dataclass(frozen=True, eq=False)
class Draw:
    """What an epoch takes from one task's set: all rows or a part of them, as they come or balanced by
    label.
    """

    rows: int  # in the set
    batch_size: int
    labels: np.ndarray | None = None  # [rows] of classes: draw each class equally often
    fraction: float = 1.0  # of the set, drawn anew each pass

    def __post_init__(self) -> None:
        if self.rows < 1 or self.batch_size < 1:
            raise ValueError(f"{self.rows} rows in batches of {self.batch_size}, expected at least 1 of each")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}, expected more than 0 and at most 1")
        if self.labels is not None and (
            len(self.labels) != self.rows or not np.array_equal(self.labels, np.round(self.labels))
        ):
            raise ValueError("balancing needs a class label for each row")

    @property
    def count(self) -> int:
        """Rows that one pass takes."""
        return max(1, round(self.fraction * self.rows))

    @property
    def batch(self) -> int:
        """Rows of a full batch."""
        return min(self.batch_size, self.count)

    @property
    def steps(self) -> int:
        """Batches of one pass, the last perhaps smaller."""
        return -(-self.count // self.batch)

    def order(self, philox: np.random.Philox) -> np.ndarray:
        """[count]: the rows of one pass in their order."""
        if self.labels is None:
            return _shuffle(self.rows, philox)[: self.count]
        classes = np.unique(self.labels)
        parts = []
        for index, label in enumerate(classes):
            members = np.flatnonzero(self.labels == label)
            members = members[_shuffle(len(members), philox)]
            share = self.count // len(classes) + (index < self.count % len(classes))
            parts.append(np.resize(members, share))  # a rare label's rows recur
        rows: np.ndarray = np.concatenate(parts)
        shuffled: np.ndarray = rows[_shuffle(len(rows), philox)]
        return shuffled


@dataclass(frozen=True, eq=False)
class Sampler:
    """The rows of every step. Raises ValueError for an unknown scheme or no task."""

    draws: Mapping[str, Draw]  # by task, in the order that batches have
    scheme: str = "cycle"
    seed: int = 0
    _orders: dict[str, tuple[tuple[int, int], np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme is {self.scheme!r}, expected one of {', '.join(SCHEMES)}")
        if not self.draws:
            raise ValueError("no task to sample from")

    @classmethod
    def of(
        cls,
        tables: Mapping[str, TokenTable],
        batch_size: int | Mapping[str, int],
        scheme: str = "cycle",
        seed: int = 0,
        fractions: Mapping[str, float] | None = None,
        balanced: Collection[str] = (),
    ) -> Sampler:
        """A sampler over tables. An epoch draws a fraction of some tasks' rows, of `balanced` ones by
        label.

        Raises ValueError for a balanced task without labels, beside the class's own.
        """
        draws = {}
        for task, table in tables.items():
            if task in balanced and table.labels is None:
                raise ValueError(f"task {task} has no labels to balance")
            draws[task] = Draw(
                rows=len(table),
                batch_size=batch_size if isinstance(batch_size, int) else batch_size[task],
                labels=table.labels if task in balanced else None,
                fraction=(fractions or {}).get(task, 1.0),
            )
        return cls(draws, scheme, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same for every epoch."""
        if self.scheme == "sequential":
            return sum(draw.steps for draw in self.draws.values())
        if self.scheme == "proportional":
            rows = sum(draw.count for draw in self.draws.values())
            return -(-rows // sum(draw.batch for draw in self.draws.values()))
        return max(draw.steps for draw in self.draws.values())

    def position(self, step: int) -> tuple[int, int]:
        """Epoch, and step within it, of a step counted over the whole run."""
        return divmod(step, self.steps_per_epoch)

    def rows(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        """[n] int64 row numbers for every task, in order; n is 0 for a task that sits this step out.

        Raises ValueError for a step outside the epoch.
        """
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} of epoch {epoch}, expected 0 to {self.steps_per_epoch - 1}")
        return {task: self._take(task, draw, epoch, *self._span(task, draw, step)) for task, draw in self.draws.items()}

    def _span(self, task: str, draw: Draw, step: int) -> tuple[int, int]:
        """The part of the epoch's sequence of rows (a pass, and perhaps more passes) that a step takes."""
        if self.scheme == "proportional":
            steps = self.steps_per_epoch
            return draw.count * step // steps, draw.count * (step + 1) // steps
        if self.scheme == "sequential":
            for name, earlier in self.draws.items():
                if name == task:
                    break
                step -= earlier.steps
            if not 0 <= step < draw.steps:
                return 0, 0
        begin, end = step * draw.batch, (step + 1) * draw.batch
        if self.scheme == "cycle" and draw.steps < self.steps_per_epoch:
            return begin, end
        return min(begin, draw.count), min(end, draw.count)

    def _take(self, task: str, draw: Draw, epoch: int, begin: int, end: int) -> np.ndarray:
        parts = [np.empty(0, dtype=np.int64)]
        while begin < end:
            turn, first = divmod(begin, draw.count)
            last = min(draw.count, first + end - begin)
            parts.append(self._order(task, draw, epoch, turn)[first:last].astype(np.int64))
            begin += last - first
        return np.concatenate(parts)

    def _order(self, task: str, draw: Draw, epoch: int, turn: int) -> np.ndarray:
        """The rows of a task's pass. The latest is kept, as making it costs far more than using it."""
        kept = self._orders.get(task)
        if kept is None or kept[0] != (epoch, turn):
            name = hashlib.blake2b(task.encode(), digest_size=8).digest()
            key = [self.seed % (1 << 64), int.from_bytes(name, "little")]
            # The lower half of the counter counts the numbers drawn.
            philox = np.random.Philox(key=key, counter=[0, 0, turn, epoch])
            kept = (epoch, turn), draw.order(philox)
            self._orders[task] = kept
        return kept[1]


def _shuffle(count: int, philox: np.random.Philox) -> np.ndarray:
    """[count] a random order of the numbers from 0 on, in 4 bytes each where they fit: sets have millions of rows."""
    order = np.argsort(philox.random_raw(count), kind="stable")
    return order.astype(np.int32) if count <= np.iinfo(np.int32).max else order
