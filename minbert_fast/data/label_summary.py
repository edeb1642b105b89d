# SPDX-License-Identifier: Apache-2.0
"""One look at the labels of a training set, before its rows are tokenized: counts and range, of one file or of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from minbert_fast.data.files import TableReader
from minbert_fast.data.inputs import Input
from minbert_fast.data.labels import MISSING, Classes, label_number, label_text, split_names

MAX_CLASSES = 10_000  # a label column with more different values has no classes


@dataclass(frozen=True)
class LabelSummary:
    """Counts and range of a training set's labels, for tasks that take their classes or their range from it."""

    rows: int = 0  # labelled rows
    counts: Mapping[str, int] = field(default_factory=dict)  # rows by `label_text`; empty above MAX_CLASSES of them
    listed: Mapping[str, int] = field(default_factory=dict)  # the same, by each name in labels that are lists
    low: float | None = None  # the smallest and the largest number; None if a label is no number
    high: float | None = None
    whole: bool = False  # all labels are whole numbers
    lists: bool = False  # some labels are lists (JSON lines, Parquet, several columns)
    empty: int = 0  # further rows whose label is empty text: no class, or none of several
    classes: tuple[str, ...] = ()  # the classes in order, if the layout or the data set names them

    def names(self) -> tuple[str, ...]:
        """`classes` if every label is one of them; else the counted labels, numbers by value before names by alphabet.

        Beside named classes a negative number is a missing label, as in the `datasets` library.
        """
        labels = [label for label in self.counts if (label_number(label) or 0) >= 0]
        if self.classes and labels and all(map(Classes(self.classes).accepts, labels)):
            return self.classes
        return tuple(sorted(self.counts, key=_order))


def summarise_labels(source: Input) -> LabelSummary:
    """Counts the labels of an input, after its layout's replacements, in bounded memory.

    Rows that cannot be read or that are skipped are not counted; those with an empty label are counted apart. Raises
    DataError if no row can be read, or if the file has no label column.
    """
    columns = source.layout.label
    counter = _Counter(columns if len(columns) > 1 else ())
    rows, low, high, whole = 0, np.inf, -np.inf, True
    with TableReader(source, counter, max_bad_rows=1.0) as reader:  # type: ignore[arg-type]  # it parses like a rule
        for table in reader.chunks():
            numbers = table.labels
            assert numbers is not None
            rows += len(numbers)
            low, high = np.minimum(low, numbers.min(initial=np.inf)), np.maximum(high, numbers.max(initial=-np.inf))
            whole = whole and bool((numbers == np.rint(numbers)).all())
    numeric = rows > 0 and not np.isnan(low)
    return LabelSummary(
        rows=rows,
        counts=dict(counter.counts) if counter.few else {},
        listed=dict(counter.listed) if counter.few else {},
        low=float(low) if numeric else None,
        high=float(high) if numeric else None,
        whole=numeric and whole,
        lists=counter.lists,
        empty=counter.empty,
        classes=source.layout.classes,
    )


class _Counter:
    """A rule that accepts any label and counts it. A label that is not a number, and every later one, becomes NaN."""

    dtype: ClassVar[str] = "float64"
    width: ClassVar[int | None] = None

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.counts: Counter[str] = Counter()  # labels that are text
        self.listed: Counter[str] = Counter(dict.fromkeys(columns, 0))  # the names in labels that are lists
        self.few = True  # false above MAX_CLASSES of them: they are no longer counted
        self.lists = bool(columns)
        self.empty = 0
        self._numeric = True  # false once a label is not a number: the later ones are not parsed

    def parse(self, value: Any) -> float:
        """Raises ValueError if the label is missing, or a list of 0 and 1."""
        number = None
        if isinstance(value, list | tuple):
            self.lists, counts, names = True, self.listed, set(split_names(value, ""))
        else:
            counts, names = self.counts, {label_text(value)}
            if not MISSING.isdisjoint(names):
                self.empty += "" in names
                raise ValueError("label is missing")
            if self._numeric:
                number = label_number(value)
        self._numeric = number is not None
        if self.few:
            counts.update(names)
            self.few = len(self.counts) + len(self.listed) <= MAX_CLASSES
        return np.nan if number is None else number


def merge_summaries(parts: Sequence[LabelSummary]) -> LabelSummary:
    """The summary of several training sets as one."""
    empty = sum(part.empty for part in parts)
    parts = [part for part in parts if part.rows]
    counts: Counter[str] = Counter()
    listed: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
        listed.update(part.listed)
    few = len(counts) + len(listed) <= MAX_CLASSES and all(part.counts or part.listed for part in parts)
    lows, highs = ([each for part in parts if (each := getattr(part, end)) is not None] for end in ("low", "high"))
    numeric = len(lows) == len(parts) > 0
    named = {part.classes for part in parts if part.classes}
    return LabelSummary(
        rows=sum(part.rows for part in parts),
        counts=dict(counts) if few else {},
        listed=dict(listed) if few else {},
        low=min(lows) if numeric else None,
        high=max(highs) if numeric else None,
        whole=numeric and all(part.whole for part in parts),
        lists=any(part.lists for part in parts),
        empty=empty,
        classes=named.pop() if len(named) == 1 else (),
    )


def _order(name: str) -> tuple[bool, float, str]:
    number = label_number(name)
    return number is None, 0.0 if number is None else number, name
