# SPDX-License-Identifier: Apache-2.0
"""CSV and TSV, with quotes as Python's `csv` module reads them, or with quotes as ordinary characters.

A row is what `csv.reader` takes as one: a quoted field may contain separators and line breaks. A row that its strict mode
refuses is reported. A quote that is never closed ends the reading with an error, since it has swallowed other rows.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from minbert_fast.data.formats import Layout
from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.course import REPEATED, kind_of_separator, repeats_header
from minbert_fast.data.readers.lines import FileRecords, Line, decode, without_end
from minbert_fast.data.readers.records import Record

MAX_RECORD_BYTES = 1 << 20  # a quoted field of more bytes is a quote that is never closed
SEPARATORS = ("\t", ",", ";")  # looked for in the header line, in this order
_CSV_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # as Python's csv reads lines: a lone CR ends one, too

Fields = list[str] | ValueError


class DelimitedRecords(FileRecords):
    """The rows of a separated file, whose first row names the columns unless the layout does.

    A first row that holds the layout's text columns is a header even if the layout names the columns of files without.
    """

    def __init__(self, path: Path, layout: Layout, separator: str) -> None:
        super().__init__(path)
        self._layout = layout
        self.separator = separator
        self._more_fields = False  # rows may have more fields than columns have names

    def begin(self) -> None:
        layout = self._layout
        lines = self.raw_lines()
        first = next((line for line in lines if without_end(line)), b"")  # the first line that is not blank
        self.separator = self.separator or _separator_of(first)
        self.kind = kind_of_separator(self.separator)
        read = self._read_plain if layout.quoting == "none" else self._read_quoted
        self._rows = read(chain([first], lines))
        found = next(self._rows, None)
        if found is None:
            raise DataError(f"{self.name}: empty file")
        line, fields = found
        self.place = f"{self.name}:{line}"
        if layout.columns and (
            isinstance(fields, ValueError) or not set(layout.texts or layout.columns) <= set(fields)
        ):
            self.names, self._rows, self._more_fields = layout.columns, chain([found], self._rows), True
        elif isinstance(fields, ValueError):
            raise DataError(f"{self.place}: {fields}")
        else:
            self.names = [name.strip() for name in fields]

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        positions, width = [list(self.names).index(name) for name in columns], len(self.names)
        for line, fields in self._rows:
            if isinstance(fields, ValueError):
                yield line, fields
            elif repeats_header(fields, self.names):
                yield line, ValueError(REPEATED)
            elif len(fields) == width or (self._more_fields and len(fields) > width):
                yield line, [fields[position] for position in positions]
            else:
                least = "at least " if self._more_fields else ""
                yield line, ValueError(f"{len(fields)} fields, expected {least}{width}")

    def _read_plain(self, lines: Iterator[Line]) -> Iterator[tuple[int, Fields]]:
        """Every line is a row; quotes are ordinary characters."""
        spaced = len(self.separator) > 1  # "label ||| text"
        for raw in lines:
            try:
                text = decode(without_end(raw))
            except ValueError as error:
                yield self.lines_read, error
                continue
            if text:
                fields = text.split(self.separator)
                yield self.lines_read, [field.strip() for field in fields] if spaced else fields

    def _read_quoted(self, lines: Iterator[Line]) -> Iterator[tuple[int, Fields]]:
        """The rows that `csv.reader` finds."""
        csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_RECORD_BYTES))
        feed = _Feed(lines)
        reader = csv.reader(feed, delimiter=self.separator)
        first = self.lines_read
        while True:
            line = first + reader.line_num  # where the next row begins; a lone CR counts as a line end
            feed.begin_row()
            try:
                fields = next(reader)
                problem = feed.check_quotes(self.separator)
            except StopIteration:
                return
            except _OpenQuoteError:
                raise DataError(
                    f"{self.name}:{line}: a quote is opened and never closed: {show(feed.text)}; if quotes are "
                    'ordinary characters in this file, set quoting = "none"'
                ) from None
            if problem := feed.fault or problem:
                yield line, problem
            elif fields:  # none: a blank line
                yield line, fields


class _OpenQuoteError(Exception):
    """A quoted field goes on to the end of the file, or for more than MAX_RECORD_BYTES."""


class _Feed:
    """Hands the lines of a file to `csv.reader`, and remembers those of the present row and their fault."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._ahead: list[str] = []  # what a lone CR divides from the present line, last first
        self.begin_row()

    def begin_row(self) -> None:
        """The next line begins a row."""
        self.fault: ValueError | None = None
        self._pieces: list[str] = []  # the row's lines
        self._length = 0

    @property
    def text(self) -> str:
        """The row's first line."""
        return self._pieces[0].rstrip("\r\n")

    def check_quotes(self, separator: str) -> ValueError | None:
        """The fault in the row's quotes, which `csv.reader` overlooks; None if there is none. Raises _OpenQuoteError."""
        if any('"' in piece for piece in self._pieces):
            try:
                next(csv.reader(self._pieces, delimiter=separator, strict=True))
            except csv.Error:
                if len(list(csv.reader([*self._pieces, "one more row"], delimiter=separator))) == 1:
                    raise _OpenQuoteError from None  # the row would go on
                return ValueError(
                    f"text after a closing quote (quotes in a quoted field are doubled): {show(self.text)}"
                )
        return None

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        if self._ahead:
            text = self._ahead.pop()
        else:
            text = self._decode(next(self._lines))
            if "\r" in text.removesuffix("\n").removesuffix("\r"):
                self._ahead = _CSV_LINES.findall(text)[::-1]
                text = self._ahead.pop()
        self._length += len(text)
        if self._pieces and self._length > MAX_RECORD_BYTES:
            raise _OpenQuoteError
        self._pieces.append(text)
        return text

    def _decode(self, raw: Line) -> str:
        """A line's text; of a line with a fault, a text that keeps its quotes."""
        try:
            return decode(raw)
        except ValueError as error:
            self.fault = self.fault or error
            if isinstance(raw, bytes):
                return raw.decode("utf-8", "replace").replace("\0", "?")
            if self._pieces:  # inside quotes
                raise _OpenQuoteError from None
            return "\n"


def _separator_of(first: Line) -> str:
    """The separator that the header line has: a tab, else a comma, else a semicolon; a comma if it has none."""
    text = first.decode("utf-8", "replace") if isinstance(first, bytes) else ""
    return next((separator for separator in SEPARATORS if separator in text), ",")
