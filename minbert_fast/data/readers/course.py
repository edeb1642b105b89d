# SPDX-License-Identifier: Apache-2.0
"""The strict reader of the course's files, which hold unbalanced quotes.

A field that starts with `"` ends at its closing quote, and quotes inside it are doubled. A quoted field may contain
separators or line breaks but not both, so that an unclosed quote spoils its own row and never the rows after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.lines import FileRecords, Line, decode
from minbert_fast.data.readers.records import Record

REPEATED = "the header line again, expected data"
MAX_RECORD_LINES = 100  # a quoted field may continue over this many further lines


class CourseRecords(FileRecords):
    """The rows of a separated file with a header line."""

    def __init__(self, path: Path, separator: str) -> None:
        super().__init__(path)
        self.separator = separator
        self.kind = kind_of_separator(separator)
        self._lines = self.numbered_lines()
        self._ahead: deque[tuple[int, Line]] = deque()  # lines that were read but not yet used

    def begin(self) -> None:
        found = self._next_line()
        if found is None:
            raise DataError(f"{self.name}: empty file")
        line, raw = found
        self.place = f"{self.name}:{line}"
        try:
            self.names = [name.strip() for name in self._split(raw, width=None)]
        except ValueError as error:
            raise DataError(f"{self.place}: {error}") from None

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        positions, width = [self.names.index(name) for name in columns], len(self.names)
        while (found := self._next_line()) is not None:
            line, raw = found
            try:
                fields = self._split(raw, width)
                if repeats_header(fields, self.names):
                    raise ValueError(REPEATED)
            except ValueError as error:
                yield line, error
            else:
                yield line, [fields[position] for position in positions]

    def _next_line(self) -> tuple[int, Line] | None:
        """The next line that is not blank, with its number; None at the end."""
        while (found := self._ahead.popleft() if self._ahead else next(self._lines, None)) and not found[1]:
            pass
        return found

    def _split(self, raw: Line, width: int | None) -> list[str]:
        """The fields of a row that begins with the line `raw`, `width` of them unless None.

        Uses up the following lines if a quoted field continues there. Raises ValueError with the reason.
        """
        text = decode(raw)
        try:
            fields = split_quoted(text, self.separator) if '"' in text else text.split(self.separator)
        except OpenQuoteError as error:
            fields = self._join(text, width)
            if not fields:
                raise ValueError(str(error)) from None
        if width is not None and len(fields) != width:
            raise ValueError(f"{len(fields)} fields, expected {width}")
        return fields

    def _join(self, text: str, width: int | None) -> list[str]:
        """The fields of `text` and the following lines; none unless those lines close the open quote and the row."""
        for count, raw in enumerate(self._peek(), start=1):
            try:
                line = decode(raw)
                text = f"{text}\n{line}"
                fields = split_quoted(text, self.separator) if '"' in line else None
            except OpenQuoteError:
                fields = None
            except ValueError:
                break
            if fields is None:  # the quote is still open: a field with a line break may have no separator
                if self.separator in line:
                    break
                continue
            if len(fields) != width or any("\n" in field and self.separator in field for field in fields):
                break
            for _ in range(count):
                self._ahead.popleft()
            return fields
        return []

    def _peek(self) -> Iterator[Line]:
        """The next lines, up to MAX_RECORD_LINES, which stay to be read."""
        for index in range(MAX_RECORD_LINES):
            if index == len(self._ahead):
                found = next(self._lines, None)
                if found is None:
                    return
                self._ahead.append(found)
            yield self._ahead[index][1]


def repeats_header(fields: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a row holds the names of all its columns, two or more, as where files were joined with their headers."""
    return (
        len(names) > 1 and len(fields) == len(names) and all(a.strip() == b for a, b in zip(fields, names, strict=True))
    )


def kind_of_separator(separator: str) -> str:
    """The columns of a file in words, such as "comma-separated columns"."""
    names = {"\t": "tab", ",": "comma", ";": "semicolon"}
    return f"{names.get(separator, show(separator))}-separated columns"


class OpenQuoteError(ValueError):
    """The line ends inside a quoted field."""


def split_quoted(text: str, separator: str) -> list[str]:
    """The fields of a row with quotes. Raises OpenQuoteError if a quote is not closed, ValueError for other errors."""
    fields: list[str] = []
    begin = 0
    while True:
        if not text.startswith('"', begin):
            end = text.find(separator, begin)
            if end < 0:
                return [*fields, text[begin:]]
            fields.append(text[begin:end])
        else:
            end = text.find('"', begin + 1)
            while end >= 0 and text.startswith('"', end + 1):  # a doubled quote is part of the text
                end = text.find('"', end + 2)
            if end < 0:
                raise OpenQuoteError(f"a quote is opened and never closed: {show(text[begin:])}")
            fields.append(text[begin + 1 : end].replace('""', '"'))
            end += 1
            if end == len(text):
                return fields
            if text[end] != separator:
                raise ValueError(
                    f"text after a closing quote (quotes in a quoted field are doubled): {show(text[begin:])}"
                )
        begin = end + 1
