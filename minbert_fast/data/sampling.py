# SPDX-License-Identifier: Apache-2.0
"""Random rows: those of each training step, a subset of a table, and a held-out dev set.

The rows of a step are a pure function of (seed, epoch, step), so training resumes at any step, and the number of steps per
epoch is known in advance. Random orders come from the raw bits of Philox, a counter-based generator, with key (seed, task)
and counter (epoch, pass): a task's order depends neither on the other tasks nor on NumPy's version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from minbert_fast.data.sentences import offsets_of
from minbert_fast.data.tokens import TokenTable

Scheme = Literal["cycle", "each-once", "sequential"]
MAX_GROUPS = 1000  # labels with more different values are not classes


def philox(seed: int, name: str, high: int, low: int) -> np.random.Philox:
    """The random stream of (seed, name, high, low). Streams of different arguments are independent."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    key = [seed % (1 << 64), int.from_bytes(digest, "little")]
    return np.random.Philox(key=key, counter=[0, 0, low, high])  # the lower half counts the numbers drawn


@dataclass(frozen=True)
class Draw:
    """How one task's rows are drawn in a pass over its table; each pass draws again.

    A class is a label rounded to the nearest whole number, so graded labels have classes too. Raises ValueError for
    settings that exclude each other.
    """

    fraction: float = 1.0  # share of the rows in a pass
    balanced: bool = False  # every class has the same share of a pass
    replacement: bool = False  # each row of a pass is drawn from the whole table, so a pass may hold a row twice
    per_class: int = 0  # a pass holds at most this many rows of each class; 0: no limit

    def __post_init__(self) -> None:
        if self.per_class and (self.balanced or self.replacement or self.fraction != 1.0):
            raise ValueError("per_class: expected no fraction, balanced or replacement beside it")

    @property
    def by_class(self) -> bool:
        """Whether the labels matter."""
        return self.balanced or self.per_class > 0


@dataclass(frozen=True, eq=False)
class TaskSampler:
    """Draws one task's rows in random order, as `draw` says."""

    rows: int  # in the table
    batch_size: int
    draw: Draw = Draw()
    labels: np.ndarray | None = None  # [rows] finite numbers; needed by a draw by class

    def __post_init__(self) -> None:
        if not self.draw.by_class:
            return
        if self.labels is None or self.labels.shape != (self.rows,) or not np.isfinite(self.labels).all():
            raise ValueError("drawing by class needs a label for each row")

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The row numbers of each class, in ascending order of the labels."""
        assert self.labels is not None
        classes = np.rint(self.labels).astype(np.int64)
        return [np.flatnonzero(classes == label) for label in np.unique(classes)]

    @cached_property
    def count(self) -> int:
        """Rows per pass."""
        if self.draw.per_class:
            return sum(min(len(rows), self.draw.per_class) for rows in self.members)
        return max(1, round(self.draw.fraction * self.rows))

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
        draw = self.draw
        if draw.replacement:
            return self._with_replacement(bits)
        if not draw.by_class:
            return _shuffle(self.rows, bits)[: self.count]
        parts = []
        for index, rows in enumerate(self.members):
            share = self.count // len(self.members) + (index < self.count % len(self.members))
            shuffled = rows[_shuffle(len(rows), bits)]
            # A balanced pass repeats the rows of a rare class.
            parts.append(shuffled[: draw.per_class] if draw.per_class else np.resize(shuffled, share))
        drawn: np.ndarray = np.concatenate(parts)
        return np.asarray(drawn[_shuffle(len(drawn), bits)])

    def _with_replacement(self, bits: np.random.Philox) -> np.ndarray:
        """Independent draws [count]: of any row, or of a row with weight 1 / (rows of its class) if balanced.

        The remainders favour no row by more than 1 part in 2**64 / rows.
        """
        if not self.draw.balanced:
            return np.asarray(bits.random_raw(self.count) % np.uint64(self.rows)).astype(np.int64)
        # Such weights make all classes equally likely.
        classes = bits.random_raw(self.count) % np.uint64(len(self.members))
        sizes = np.array([len(rows) for rows in self.members], dtype=np.uint64)
        within = (bits.random_raw(self.count) % sizes[classes]).astype(np.int64)
        return np.asarray(np.concatenate(self.members)[offsets_of(sizes)[classes] + within])


@dataclass(frozen=True, eq=False)
class Sampler:
    """The rows of every step.

    Scheme `cycle` takes a batch of every task per step and restarts short tables until the longest has been read once;
    `each-once` takes a batch of every task until its table has been read once; `sequential` takes all batches of the first
    task, then all of the second, and so on.
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
        draws: Mapping[str, Draw] | None = None,
    ) -> Sampler:
        """A sampler of tables; a task without an entry in `draws` reads its whole table in each pass.

        Raises ValueError for a task that is drawn by class and has no labels.
        """
        tasks = {}
        for task, table in tables.items():
            draw = (draws or {}).get(task, Draw())
            if draw.by_class and table.labels is None:
                raise ValueError(f"task {task} has no labels to draw by class")
            tasks[task] = TaskSampler(
                rows=len(table),
                batch_size=batch_size if isinstance(batch_size, int) else batch_size[task],
                draw=draw,
                labels=table.labels if draw.by_class else None,
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


def subset(rows: int, count: int, seed: int, name: str) -> np.ndarray:
    """`count` different row numbers below `rows` (all of them if there are no more), ascending, int64."""
    return np.sort(_shuffle(rows, philox(seed, name, 0, 0))[:count]).astype(np.int64)


def hold_out(
    table: TokenTable, share: float = 0.1, seed: int = 0, others: Sequence[TokenTable] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows of a table at random: numbers of the rows to train on, and of those held out, both ascending.

    Labels that are whole numbers with few values are classes: each is held out in proportion, and keeps a row to train on.
    `others` have the same rows with other labels, whose classes count too. The split depends on the number of rows, the
    labels, `share` and `seed` alone. Raises ValueError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share = {share}: expected 0 < share < 1")
    count = len(table)
    order = _shuffle(count, philox(seed, "hold-out", 0, 0))
    kept = np.zeros(count, dtype=bool)
    groups = [found for each in (table, *others) if (found := _groups(each.labels)) is not None]
    if groups:
        order = order[np.lexsort([each[order] for each in reversed(groups)])]  # class after class, each in random order
    for each in groups:
        kept[order[np.unique(each[order], return_index=True)[1]]] = True  # the first row of each class
    candidates = order[~kept[order]]
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


def _shuffle(count: int, bits: np.random.Philox) -> np.ndarray:
    """The numbers 0 to count - 1 in random order, as int32 if they fit: tables may have millions of rows."""
    order = np.argsort(bits.random_raw(count), kind="stable")
    return order.astype(np.int32) if count <= np.iinfo(np.int32).max else order
