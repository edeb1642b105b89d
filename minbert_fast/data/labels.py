# SPDX-License-Identifier: Apache-2.0
"""Turns the labels of a data file into numbers: one frozen rule per kind of label.

A rule is data. Its `repr` is part of the token cache's key, so that two tasks with different rules never share an entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from minbert_fast.data.messages import show

# float() would also accept nan, 1_0 and more.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"([+-]?\d+)\.0*", re.ASCII)
#: Texts of a missing label: an empty cell, and those that pandas writes. None of them is a class unless a task names it.
MISSING = frozenset(("", "nan", "NaN", "<NA>", "NaT"))


def label_text(value: object) -> str:
    """A label as text, the same for every file format: `1.0` and 1 become `1`, True becomes `true`.

    Raises ValueError for a set, a dict or bytes, whose text is no name.
    """
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, set | frozenset | Mapping | bytes):
        raise ValueError(f"label is {show(value)}, expected a name, a number or a list of names")
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def label_number(value: object) -> float | None:
    """A label as a finite number; None if it is none."""
    if isinstance(value, bool | np.bool_):
        return float(value)
    text = str(value).strip()
    return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else None


@dataclass(frozen=True)
class Classes:
    """One of the classes `names`: the number of its name. A file may hold the numbers instead, if no name is a number."""

    names: tuple[str, ...]

    dtype: ClassVar[str] = "int64"
    width: ClassVar[int | None] = None  # None: one number per row

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each class, by its name as `label_text` writes it."""
        return {label_text(name): number for number, name in enumerate(self.names)}

    @cached_property
    def _may_be_numbers(self) -> bool:
        return all(label_number(name) is None for name in self.names)

    def parse(self, value: object) -> float:
        """Raises ValueError with the value and the classes."""
        text = label_text(value)
        number = self.numbers.get(text)
        if number is not None:
            return float(number)
        if text.isascii() and text.isdigit() and int(text) < len(self.names) and self._may_be_numbers:
            return float(text)
        known = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        raise ValueError(f"label {show(text)} is not one of the {len(self.names)} classes ({known})")

    def accepts(self, value: object) -> bool:
        """Whether `parse` returns a number."""
        with suppress(ValueError):
            self.parse(value)
            return True
        return False


@dataclass(frozen=True)
class Numbers:
    """A number from `low` to `high` (None: no bound)."""

    low: float | None = None
    high: float | None = None

    dtype: ClassVar[str] = "float32"
    width: ClassVar[int | None] = None

    def parse(self, value: object) -> float:
        """Raises ValueError with the value and the bounds."""
        number = label_number(value)
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        if number is not None and low <= number <= high:
            return number
        bounds = "" if self.low is None and self.high is None else f" from {low:g} to {high:g}"
        raise ValueError(f"label {show(label_text(value))} is not a number{bounds}")


@dataclass(frozen=True)
class ClassSets:
    """Any number of the classes `names`: a row [C] of zeros and ones.

    The value is a list of names, or text in which `separator` divides names; an empty value is the empty set.
    """

    names: tuple[str, ...]
    separator: str = ","

    dtype: ClassVar[str] = "float32"

    @property
    def width(self) -> int:
        """Numbers per row."""
        return len(self.names)

    @cached_property
    def _classes(self) -> Classes:
        return Classes(self.names)

    def parse(self, value: object) -> list[float]:
        """Raises ValueError with the first unknown name."""
        row = [0.0] * len(self.names)
        for name in split_names(value, self.separator):
            row[int(self._classes.parse(name))] = 1.0
        return row


@dataclass(frozen=True)
class Label:
    """Numbers from `low` to `high`, whole numbers only if `whole`; messages name the column."""

    column: str
    low: int
    high: int
    whole: bool
    dtype: str  # of the label array: int64 for classes, float32 for regression and pair tasks

    width: ClassVar[int | None] = None

    def parse(self, value: object) -> float:
        """Raises ValueError with the value and what was expected."""
        kind = "a whole number" if self.whole else "a number"
        number = label_number(value)
        if number is not None and self.low <= number <= self.high and (not self.whole or number == int(number)):
            return number
        raise ValueError(f"{self.column} is {show(value)}, expected {kind} from {self.low} to {self.high}")


Rule = Classes | Numbers | ClassSets | Label


def split_names(value: object, separator: str) -> list[str]:
    """The names in a label of several classes, those that are empty left out.

    Raises ValueError for a row of 0 and 1: their places would be lost.
    """
    parts = value if isinstance(value, list | tuple) else str(value).split(separator)
    names = [name for part in parts if (name := label_text(part))]
    different = set(names)
    if len(different) < len(names) and different <= {"0", "1", "true", "false"}:
        raise ValueError(
            f"label is {show(value)}, expected the names of its classes; 0 and 1 need a column for each class"
        )
    return names
