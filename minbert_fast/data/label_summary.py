# SPDX-License-Identifier: Apache-2.0
"""One look at the labels of a training set, before its rows are tokenized."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import numpy as np

from minbert_fast.data.files import open_rows
from minbert_fast.data.inputs import Input
from minbert_fast.data.labels import MAX_CLASSES, LabelSummary, label_number, label_text


def summarise_labels(source: Input) -> LabelSummary:
    """Counts the labels of an input, after its layout's replacements, in bounded memory.

    Rows that cannot be read or that are skipped are not counted; those with an empty label are counted apart. Raises
    DataError if no row can be read, or if the file has no label column.
    """
    columns = source.layout.label
    counter = _Counter(columns if len(columns) > 1 else ())
    rows, low, high, whole = 0, np.inf, -np.inf, True
    with open_rows(source, counter, max_bad_rows=1.0) as reader:  # type: ignore[arg-type]  # it parses like a rule
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
        """Raises ValueError if the label is empty."""
        number = None
        if isinstance(value, list | tuple | np.ndarray):
            self.lists, counts, names = True, self.listed, {name for each in value if (name := label_text(each))}
        else:
            counts, names = self.counts, {label_text(value)}
            if "" in names:
                self.empty += 1
                raise ValueError("label is missing")
            if self._numeric:
                number = label_number(value)
        self._numeric = number is not None
        if self.few:
            counts.update(names)
            self.few = len(self.counts) + len(self.listed) <= MAX_CLASSES
        return np.nan if number is None else number
