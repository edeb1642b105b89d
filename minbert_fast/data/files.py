# SPDX-License-Identifier: Apache-2.0
"""Reads records of any format into tables. Every row is used, left out because of its label, or reported with its place.

rows read = rows in the table + rows left out + rows reported
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.data.columns import choose_columns
from minbert_fast.data.formats import Layout
from minbert_fast.data.inputs import Input, file_input
from minbert_fast.data.labels import Rule, label_text
from minbert_fast.data.messages import BadRow, DataError, check_bad_rows, show
from minbert_fast.data.readers.records import Record

Row = tuple[int, str, Sequence[str], Any]  # line, id, texts, label

CHUNK_ROWS = 8192
MAX_BAD_ROWS = 0.01  # a file with a larger share of bad rows is refused


@dataclass(frozen=True)
class Table:
    """The rows of one input, or of a part of it."""

    task: str  # name of the layout
    path: Path  # of the file, or the name of what is no file
    sentences: tuple[list[str], ...]  # one list [n] per text of an example
    labels: np.ndarray | None  # [n] or [n, C] in the rule's dtype; None if labels were not read
    ids: list[str]
    lines: np.ndarray  # [n] int64: the line where each row begins in the file
    bad_rows: tuple[BadRow, ...] = ()
    skipped: int = 0  # rows left out because of their label

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def rows_read(self) -> int:
        """Rows that were read: those of the table, the skipped and the bad ones."""
        return len(self) + self.skipped + len(self.bad_rows)


def read_table(
    path: str | os.PathLike[str], layout: str | Layout, *, labeled: bool = True, max_bad_rows: float = MAX_BAD_ROWS
) -> Table:
    """Reads a whole file of a layout into memory; `labeled=False` needs no label column. Otherwise like `read_rows`."""
    source = file_input(os.fspath(path), layout)
    return read_rows(source, source.layout.rule if labeled else None, max_bad_rows=max_bad_rows)


def read_rows(source: Input, rule: Rule | None, *, max_bad_rows: float = MAX_BAD_ROWS) -> Table:
    """Reads an input into memory, with labels by `rule` (None: without labels).

    Malformed rows are listed in `bad_rows`. A file whose share of bad rows reaches `max_bad_rows` is refused.
    Raises DataError (one line that names the place) if a file is not a readable file of its layout.
    """
    with TableReader(source, rule, max_bad_rows=max_bad_rows) as reader:
        parts = list(reader.chunks(sys.maxsize))
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    return Table(
        task=source.layout.name,
        path=source.path,
        sentences=tuple(
            [text for texts in column for text in texts]
            for column in zip(*(part.sentences for part in parts), strict=True)
        ),
        labels=np.concatenate(labels) if labels else None,
        ids=[name for part in parts for name in part.ids],
        lines=np.concatenate([part.lines for part in parts]),
        bad_rows=tuple(bad for part in parts for bad in part.bad_rows),
        skipped=sum(part.skipped for part in parts),
    )


class TableReader:
    """Reads an input in chunks of rows, in bounded memory. Use it as a context manager. Raises DataError like `read_rows`.

    `size` is the size of the files in bytes (0 for standard input; rows in memory: their number), and `position` how much of
    it was read so far.
    """

    def __init__(self, source: Input, rule: Rule | None, *, max_bad_rows: float = MAX_BAD_ROWS) -> None:
        first, *self._more = source.parts
        self._rule, self._max_bad_rows = rule, max_bad_rows
        self._closed = 0  # the part of `size` in closed files
        self._open(first)  # reports a mistake at once
        self.size = self._records.size + sum(part.size for part in self._more)

    def _open(self, part: Input) -> None:
        """Opens one file, one split of a hub data set, or rows in memory."""
        self._part, self._records = part, part.open()
        try:
            self._columns = choose_columns(self._records, part.layout, part.texts, labeled=self._rule is not None)
        except BaseException:
            self._records.close()
            raise

    def __enter__(self) -> TableReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._records.close()

    @property
    def position(self) -> int:
        """How much of `size` was read."""
        return self._closed + self._records.position

    def chunks(self, rows: int = CHUNK_ROWS) -> Iterator[Table]:
        """Yields tables of up to `rows` rows, bad rows included; a table has rows of one file.

        Raises DataError at the end of a file if it has no rows or too many bad ones.
        """
        yield from self._chunks(rows)
        for part in self._more:
            self._records.close()
            self._closed += self._records.position
            self._open(part)
            yield from self._chunks(rows)

    def _chunks(self, rows: int) -> Iterator[Table]:
        """The tables of the open file."""
        records = self._records.rows(self._columns.all)
        read = bad = skipped = 0
        first_bad: BadRow | None = None
        while (table := self._table(islice(records, rows))).rows_read:
            read += table.rows_read
            bad += len(table.bad_rows)
            skipped += table.skipped
            first_bad = first_bad or next(iter(table.bad_rows), None)
            yield table
        check_bad_rows(self._part.path, read, bad, first_bad, self._max_bad_rows)
        if read == bad + skipped:
            raise DataError(f"{self._records.name}: no row is left: {skipped:,} have a label that is skipped")

    def _table(self, records: Iterable[Record]) -> Table:
        path, rule = self._part.path, self._rule
        good: list[Row] = []
        bad: list[BadRow] = []
        skipped = 0
        for line, values in records:
            try:
                if isinstance(values, ValueError):
                    raise values
                row = self._parse(line, values)
            except ValueError as error:
                bad.append(BadRow(path, line, str(error)))
                continue
            if row is None:
                skipped += 1
            else:
                good.append(row)
        labels = None
        if rule is not None:
            labels = np.array([label for _, _, _, label in good], dtype=rule.dtype)
            if rule.width is not None:
                labels = labels.reshape(len(good), rule.width)
        return Table(
            task=self._part.layout.name,
            path=path,
            sentences=tuple([texts[i] for _, _, texts, _ in good] for i in range(len(self._columns.texts))),
            labels=labels,
            ids=[name for _, name, _, _ in good],
            lines=np.array([line for line, _, _, _ in good], dtype=np.int64),
            bad_rows=tuple(bad),
            skipped=skipped,
        )

    def _parse(self, line: int, values: Sequence[Any]) -> Row | None:
        """A row; None if its label says to skip it. Raises ValueError with the reason."""
        name, first = str(line), 0
        if self._columns.id:
            name, first = _identity(self._columns.id, values[0]), 1
        end = first + len(self._columns.texts)
        texts = values[first:end]
        for column, text in zip(self._columns.texts, texts, strict=True):
            if type(text) is not str or not text.isascii():  # the common case costs no call
                text_of(column, text)
        if self._rule is None:
            return line, name, texts, 0.0
        label = self._label(values[end:])
        if self._part.layout.skip and label_text(label) in self._part.layout.skip:
            return None
        return line, name, texts, self._rule.parse(self._replaced(label))

    def _label(self, values: Sequence[Any]) -> Any:
        """The label as written in the file; for several columns of 0 and 1, the names of those with 1."""
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]  # of NumPy, of torch
        if len(values) == 1:
            label = values[0]
        else:
            marks = [label_text(value).lower() for value in values]
            for column, mark in zip(self._columns.label, marks, strict=True):
                if mark not in ("0", "1", "false", "true"):
                    raise ValueError(f"{column} is {show(mark)}, expected 0 or 1")
            label = [c for c, mark in zip(self._columns.label, marks, strict=True) if mark in ("1", "true")]
        if label is None or (isinstance(label, float) and math.isnan(label)):
            raise ValueError(f"{self._columns.label[0]} is missing")
        return label

    def _replaced(self, label: Any) -> Any:
        """The label, or what the layout replaces it with."""
        replacements = self._part.layout.values
        if not replacements:
            return label
        if isinstance(label, list | tuple):
            return [replacements.get(label_text(each), each) for each in label]
        return replacements.get(label_text(label), label)


def text_of(column: str, value: Any) -> str:
    """A value that is text. Raises ValueError if it is none, or cannot be UTF-8 (JSON may write half a character)."""
    if not isinstance(value, str):
        raise ValueError(f"{column} is {show(value)}, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{column} has half a surrogate pair: {show(value)}") from None
    return value


def _identity(column: str, value: Any) -> str:
    """A row's id. Raises ValueError for one that would not fit on a line of a prediction file."""
    if value is None:
        raise ValueError(f"{column} is missing")
    name = text_of(column, str(value).strip())
    if "\n" in name or "\r" in name:
        raise ValueError(f"{column} is {show(name)}, expected an id without line breaks")
    return name
