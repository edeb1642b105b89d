# SPDX-License-Identifier: Apache-2.0
"""Rows in memory: a list of dicts, of tuples (texts, then the label) or of texts; or data stored by columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.columnar import DatasetRecords, DictRecords, FrameRecords
from minbert_fast.data.readers.jsonl import value_of
from minbert_fast.data.readers.records import Record, Records

EXPECTED = "a list of dicts or of tuples, a dict of lists, a pandas or polars DataFrame, or a datasets.Dataset"
ROW_METHODS = ("to_dicts", "to_pylist")  # of a polars DataFrame, of an Arrow table: a list of dicts


def memory_records(rows: Any, name: str, texts: Sequence[str], label: Sequence[str]) -> Records:
    """The reader of rows in memory; `texts` and `label` name the values of a tuple. Raises DataError for anything else."""
    if is_dataset(rows):
        return DatasetRecords(rows, name)
    if hasattr(rows, "columns") and hasattr(rows, "notna"):
        return FrameRecords(rows, name)
    if isinstance(rows, Mapping):
        return DictRecords(rows, name)
    rows = next((getattr(rows, method)() for method in ROW_METHODS if hasattr(rows, method)), rows)
    if not isinstance(rows, Sequence) or isinstance(rows, str | bytes):
        raise DataError(f"{name}: rows of type {type(rows).__name__}, expected {EXPECTED}")
    if not rows:
        raise DataError(f"{name}: no rows")
    return ObjectRecords(rows, name) if isinstance(rows[0], Mapping) else TupleRecords(rows, name, texts, label)


def is_dataset(rows: Any) -> bool:
    """Whether these rows are a `datasets.Dataset`."""
    return hasattr(rows, "column_names") and hasattr(rows, "features") and hasattr(rows, "__len__")


class ObjectRecords(Records):
    """A list of dicts. `names` are the keys of the first one. The line of a row is its number, from 1."""

    kind = "keys"
    names_vary = True

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self.name = self.place = name
        self.names = [str(key) for key in rows[0]]
        self._rows = rows
        self.size = len(rows)

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        for number, row in enumerate(self._rows, start=1):
            self.position = number
            try:
                if not isinstance(row, Mapping):
                    raise ValueError(f"expected a dict, found {show(row)}")
                yield number, [value_of(row, column) for column in columns]
            except ValueError as error:
                yield number, error


class TupleRecords(Records):
    """A list of tuples, each the texts of an example, then its label if it has one; a single text needs no tuple."""

    def __init__(self, rows: Sequence[Any], name: str, texts: Sequence[str], label: Sequence[str]) -> None:
        self.name = self.place = name
        self._rows = rows
        self._width = len(_tuple(rows[0]))
        self._texts = len(texts)
        if not self._texts <= self._width <= self._texts + 1:
            raise DataError(f"{name}:1: {self._problem(_tuple(rows[0]))}")
        self.names = [*texts, *label][: self._width]
        self.size = len(rows)

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        positions = [list(self.names).index(column) for column in columns]
        for number, row in enumerate(self._rows, start=1):
            self.position = number
            values = _tuple(row)
            if len(values) == self._width:
                yield number, [values[position] for position in positions]
            else:
                yield number, ValueError(self._problem(values))

    def _problem(self, values: Sequence[Any]) -> str:
        label = "" if self._width == self._texts else ", then a label"
        return f"a row of {len(values)} values, expected {self._texts} of text{label}: {show(values)}"


def _tuple(row: Any) -> Sequence[Any]:
    return row if isinstance(row, tuple | list) else (row,)
