# SPDX-License-Identifier: Apache-2.0
"""One look at the labels of a training set, before its rows are tokenized."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
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
    counter = _Counter(source.layout.label if len(source.layout.label) > 1 else ())
    with open_rows(source, counter, max_bad_rows=1.0) as reader:  # type: ignore[arg-type]  # it parses like a rule
        for _ in reader.chunks():
            pass
    return replace(counter.summary(), classes=source.layout.classes)


class _Counter:
    """A rule that accepts any label, and counts it."""

    dtype: ClassVar[str] = "float32"
    width: ClassVar[int | None] = None

    def __init__(self, columns: tuple[str, ...]) -> None:
        self._counts: Counter[str] | None = Counter(dict.fromkeys(columns, 0))
        self._rows = 0
        self._low, self._high = np.inf, -np.inf
        self._numbers = self._whole = True
        self._lists = bool(columns)

    def parse(self, value: Any) -> float:
        """Counts a label. Raises ValueError if it is empty."""
        if isinstance(value, list | tuple | np.ndarray):
            self._lists, names = True, [label_text(each) for each in value]
        else:
            names = [label_text(value)]
            if not names[0]:
                raise ValueError("label is missing")
        self._rows += 1
        if self._counts is not None:
            self._counts.update(names)
            if len(self._counts) > MAX_CLASSES:
                self._counts = None
        if self._numbers:
            self._see_number(value)
        return 0.0

    def _see_number(self, value: Any) -> None:
        number = None if self._lists else label_number(value)
        if number is None:
            self._numbers = self._whole = False
            return
        self._low, self._high = min(self._low, number), max(self._high, number)
        self._whole = self._whole and number == round(number)

    def summary(self) -> LabelSummary:
        """What was counted."""
        known = self._numbers and self._rows > 0
        return LabelSummary(
            rows=self._rows,
            counts=dict(self._counts or {}),
            low=float(self._low) if known else None,
            high=float(self._high) if known else None,
            whole=known and self._whole,
            lists=self._lists,
        )
