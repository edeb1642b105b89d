# SPDX-License-Identifier: Apache-2.0
"""The rows that each task contributes to a step: a pure function of (seed, epoch, step).

The sampler has no state, so training resumes at any step, and the number of steps per epoch is known in advance. Random
orders come from the raw bits of Philox, a counter-based generator, with key (seed, task) and counter (epoch, pass): a
task's order depends neither on the other tasks nor on NumPy's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from minbert_fast.data.tokens import TokenTable

Scheme = Literal["cycle", "each-once", "sequential"]


def philox(seed: int, name: str, high: int, low: int) -> np.random.Philox:
    """The random stream of (seed, name, high, low). Streams of different arguments are independent."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    key = [seed % (1 << 64), int.from_bytes(digest, "little")]
    return np.random.Philox(key=key, counter=[0, 0, low, high])  # the lower half counts the numbers drawn


@dataclass(frozen=True, eq=False)
class TaskSampler:
    """Draws one task's rows: all rows or a fraction, in random order, optionally balanced by label."""

    rows: int  # in the table
    batch_size: int
    labels: np.ndarray | None = None  # [rows] classes to balance; None: no balancing
    fraction: float = 1.0  # of the rows; each pass draws a new subset

    def __post_init__(self) -> None:
        labels = self.labels
        if labels is not None and (len(labels) != self.rows or not np.array_equal(labels, np.round(labels))):
            raise ValueError("balancing needs a class label for each row")

    @property
    def count(self) -> int:
        """Rows per pass."""
        return max(1, round(self.fraction * self.rows))

    @property
    def batch(self) -> int:
        """Rows of a full batch."""
        return min(self.batch_size, self.count)

    @property
    def steps(self) -> int:
        """Batches per pass; the last may be smaller."""
        return -(-self.count // self.batch)

    def shuffle(self, bits: np.random.Philox) -> np.ndarray:
        """The rows of one pass in random order, [count]."""
        if self.labels is None:
            return _shuffle(self.rows, bits)[: self.count]
        classes = np.unique(self.labels)
        parts = []
        for index, label in enumerate(classes):
            members = np.flatnonzero(self.labels == label)
            members = members[_shuffle(len(members), bits)]
            share = self.count // len(classes) + (index < self.count % len(classes))
            parts.append(np.resize(members, share))  # repeats the rows of a rare label
        rows: np.ndarray = np.concatenate(parts)
        return np.asarray(rows[_shuffle(len(rows), bits)])


@dataclass(frozen=True, eq=False)
class Sampler:
    """The rows of every step.

    Scheme `cycle` takes a batch of every task per step and restarts short tables until the longest has been read once;
    `each-once` takes a batch of every task until its table has been read once; `sequential` reads one table after the
    other.
    """

    tasks: Mapping[str, TaskSampler]  # in the order of the tasks in a batch
    scheme: Scheme = "cycle"
    seed: int = 0
    _orders: dict[str, tuple[tuple[int, int], np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_tables(
        cls,
        tables: Mapping[str, TokenTable],
        batch_size: int | Mapping[str, int],
        scheme: Scheme = "cycle",
        seed: int = 0,
        fractions: Mapping[str, float] | None = None,
        balanced: Collection[str] = (),
    ) -> Sampler:
        """A sampler of tables. `fractions` limits the rows per epoch of some tasks; `balanced` names tasks to balance.

        Raises ValueError for a balanced task without class labels.
        """
        tasks = {}
        for task, table in tables.items():
            if task in balanced and table.labels is None:
                raise ValueError(f"task {task} has no labels to balance")
            tasks[task] = TaskSampler(
                rows=len(table),
                batch_size=batch_size if isinstance(batch_size, int) else batch_size[task],
                labels=table.labels if task in balanced else None,
                fraction=(fractions or {}).get(task, 1.0),
            )
        return cls(tasks, scheme, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch, the same for every epoch."""
        steps = [sampler.steps for sampler in self.tasks.values()]
        return sum(steps) if self.scheme == "sequential" else max(steps)

    def rows(self, step: int) -> dict[str, np.ndarray]:
        """Row numbers int64 [n] by task, for a step counted over the whole run; n is 0 for a task that it omits."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return {task: self._take(task, epoch, *self._span(task, step)) for task in self.tasks}

    def _span(self, task: str, step: int) -> tuple[int, int]:
        """The range that a step takes from the epoch's sequence of rows; under `cycle` the sequence has many passes."""
        sampler = self.tasks[task]
        if self.scheme == "sequential":
            for name, earlier in self.tasks.items():
                if name == task:
                    break
                step -= earlier.steps
            if not 0 <= step < sampler.steps:
                return 0, 0
        begin, end = step * sampler.batch, (step + 1) * sampler.batch
        if self.scheme == "cycle" and sampler.steps < self.steps_per_epoch:
            return begin, end
        return min(begin, sampler.count), min(end, sampler.count)

    def _take(self, task: str, epoch: int, begin: int, end: int) -> np.ndarray:
        count = self.tasks[task].count
        parts = [np.empty(0, dtype=np.int64)]
        while begin < end:
            turn, first = divmod(begin, count)
            last = min(count, first + end - begin)
            parts.append(self._order(task, epoch, turn)[first:last].astype(np.int64))
            begin += last - first
        return np.concatenate(parts)

    def _order(self, task: str, epoch: int, turn: int) -> np.ndarray:
        """The rows of a task's pass number `turn`. The latest order is cached: shuffling costs far more than reading."""
        cached = self._orders.get(task)
        if cached is None or cached[0] != (epoch, turn):
            cached = (epoch, turn), self.tasks[task].shuffle(philox(self.seed, task, epoch, turn))
            self._orders[task] = cached
        return cached[1]


def _shuffle(count: int, bits: np.random.Philox) -> np.ndarray:
    """The numbers 0 to count - 1 in random order, as int32 if they fit: tables may have millions of rows."""
    order = np.argsort(bits.random_raw(count), kind="stable")
    return order.astype(np.int32) if count <= np.iinfo(np.int32).max else order
