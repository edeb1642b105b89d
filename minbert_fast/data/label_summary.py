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

    Rows that cannot be read, that are skipped, or whose label is empty are not counted. Raises DataError if no row can be
    read, or if the file has no label column.
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
        counts=dict(counter.counts or {}),
        low=float(low) if numeric else None,
        high=float(high) if numeric else None,
        whole=numeric and whole,
        lists=counter.lists,
        classes=source.layout.classes,
    )


class _Counter:
    """A rule that accepts any label and counts it. A label that is not a number, and every later one, becomes NaN."""

    dtype: ClassVar[str] = "float64"
    width: ClassVar[int | None] = None

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.counts: Counter[str] | None = Counter(dict.fromkeys(columns, 0))  # None: more than MAX_CLASSES
        self.lists = bool(columns)
        self._numeric = True  # false once a label is not a number: the later ones are not parsed

    def parse(self, value: Any) -> float:
        """Raises ValueError if the label is empty."""
        number = None
        if isinstance(value, list | tuple | np.ndarray):
            self.lists, names = True, [label_text(each) for each in value]
        else:
            names = [label_text(value)]
            if not names[0]:
                raise ValueError("label is missing")
            if self._numeric:
                number = label_number(value)
        self._numeric = number is not None
        if self.counts is not None:
            self.counts.update(names)
            if len(self.counts) > MAX_CLASSES:
                self.counts = None
        return np.nan if number is None else number
