# SPDX-License-Identifier: Apache-2.0
"""Data that are stored column by column: Parquet, data sets of the `datasets` library, pandas frames, dicts of lists."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minbert_fast.common.errors import first_line
from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.jsonl import value_of
from minbert_fast.data.readers.records import Record, Records, open_regular

BATCH = 4096  # rows that are read at a time


class ColumnRecords(Records):
    """Rows of equally long columns. The line of a row is its number, from 1. Dots lead into nested columns."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        self.name = self.place = name
        self.names = names

    @abstractmethod
    def batches(self, columns: Sequence[str]) -> Iterator[list[Sequence[Any]]]:
        """The values of some columns (names without dots), batch after batch."""

    def problem(self, column: str) -> str:
        return super().problem(self._root(column))

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        roots = [self._root(column) for column in columns]
        nested = roots != list(columns)
        stored = list(dict.fromkeys(roots))
        number = 0
        for batch in self.batches(stored):
            found = dict(zip(stored, batch, strict=True))
            for values in zip(*(found[root] for root in roots), strict=True):
                number += 1
                if not nested:
                    yield number, values
                    continue
                try:
                    yield number, [value_of({r: v}, c) for c, r, v in zip(columns, roots, values, strict=True)]
                except ValueError as error:
                    yield number, error

    def _root(self, column: str) -> str:
        """The stored column that holds `column`."""
        return column if column in self.names else column.partition(".")[0]


class ParquetRecords(ColumnRecords):
    """A Parquet file, read row group by row group. Raises DataError without pyarrow."""

    def __init__(self, path: Path, name: str) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            raise DataError(f"{name}: a Parquet file needs pyarrow: pip install 'minbert-fast[data]'") from None
        self._errors = (ArrowException, OSError)
        with open_regular(path) as file:
            self.size = os.fstat(file.fileno()).st_size
        try:
            self._file = parquet.ParquetFile(path)
        except self._errors as error:
            raise DataError(f"{name}: not a Parquet file: {first_line(error)}") from None
        super().__init__(name, self._file.schema_arrow.names)

    def batches(self, columns: Sequence[str]) -> Iterator[list[Sequence[Any]]]:
        done, total = 0, self._file.metadata.num_rows
        try:
            for batch in self._file.iter_batches(BATCH, columns=list(columns)):
                done += batch.num_rows
                self.position = self.size * done // total
                yield [batch.column(column).to_pylist() for column in columns]
        except self._errors as error:
            raise DataError(f"{self.name}: cannot be read after row {done:,}: {first_line(error)}") from None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class DatasetRecords(ColumnRecords):
    """A `datasets.Dataset`. The numbers of a ClassLabel column become the names of its classes."""

    def __init__(self, dataset: Any, name: str) -> None:
        super().__init__(name, list(dataset.column_names))
        self._dataset = dataset.with_format(None)
        self.size = len(dataset)

    def batches(self, columns: Sequence[str]) -> Iterator[list[Sequence[Any]]]:
        names = {column: self.class_names(column) for column in columns}
        for batch in self._dataset.select_columns(list(columns)).iter(BATCH):
            self.position += len(batch[columns[0]])
            yield [_named(batch[column], names[column]) if names[column] else batch[column] for column in columns]

    def class_names(self, column: str) -> tuple[str, ...]:
        """Names of the classes that a column numbers, in order; empty if it has none."""
        feature = self._dataset.features.get(column)
        feature = getattr(feature, "feature", feature)  # of a list: that of its items
        return tuple(getattr(feature, "names", None) or ())


class FrameRecords(ColumnRecords):
    """A pandas data frame; NaN, NaT and NA are missing values."""

    def __init__(self, frame: Any, name: str) -> None:
        self._frame = frame.rename(columns=str)  # pandas numbers the columns of a file without a header line
        super().__init__(name, list(self._frame.columns))
        self.size = len(frame)

    def batches(self, columns: Sequence[str]) -> Iterator[list[Sequence[Any]]]:
        part = self._frame[list(columns)]
        part = part.astype(object).where(part.notna(), None)
        self.position = self.size
        yield [part[column].tolist() for column in columns]


class DictRecords(ColumnRecords):
    """A dict of lists. Raises DataError unless they are lists of one length."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], name: str) -> None:
        super().__init__(name, list(columns))
        self._columns = columns
        for key, values in columns.items():
            if isinstance(values, str) or not hasattr(values, "__len__"):
                raise DataError(f"{name}: column {show(key)} is {show(values)}, expected a list")
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            sizes = ", ".join(f"{key} {len(values):,}" for key, values in columns.items())
            raise DataError(f"{name}: columns of different lengths: {sizes}")
        self.size = max(lengths, default=0)

    def batches(self, columns: Sequence[str]) -> Iterator[list[Sequence[Any]]]:
        self.position = self.size
        yield [self._columns[column] for column in columns]


def _named(values: Sequence[Any], names: tuple[str, ...]) -> list[Any]:
    """Class numbers as names; a number without a name (-1: no label) stays."""

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(each) for each in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    return [name(value) for value in values]
