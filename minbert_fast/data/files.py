# SPDX-License-Identifier: Apache-2.0
"""Reads data files. Every row is either used, or reported with file, line and reason.

The files are tab-separated (nli-triplets: comma-separated) with a header line. Columns are found by name; extra columns
and any column order are allowed. Quoting follows CSV: a field that starts with `"` ends at its closing quote, and quotes
inside it are doubled. A quoted field may contain separators or line breaks but not both, so that an unclosed quote
spoils its own row and never the rows after it.

    rows read = rows in the table + rows reported
"""

from __future__ import annotations

import os
import stat
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minbert_fast.data.formats import DataError, FileFormat, format_of, show, show_path

MAX_LINE_BYTES = 1 << 20  # a longer line is reported as a bad row
MAX_RECORD_LINES = 100  # a quoted field may continue over this many further lines
CHUNK_ROWS = 8192

Line = bytes | ValueError  # a line without its end; an error in place of a line that is too long


@dataclass(frozen=True)
class BadRow:
    """A row that was read but not used. `str()` gives `file:line: reason`."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{show_path(self.path)}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Table:
    """The rows of one file, or of a part of it."""

    task: str
    path: Path
    sentences: tuple[list[str], ...]  # one list [n] per sentence of an example
    labels: np.ndarray | None  # [n] in the format's dtype; None for an unlabelled file
    ids: list[str]
    lines: np.ndarray  # [n] int64: the line where each row begins in the file
    bad_rows: tuple[BadRow, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def rows_read(self) -> int:
        """Rows that were read: those of the table and the bad ones."""
        return len(self) + len(self.bad_rows)


def read_table(
    path: str | os.PathLike[str], task: str | FileFormat, *, labeled: bool = True, max_bad_rows: float = 0.01
) -> Table:
    """Reads a whole file into memory.

    With `labeled=False` the file needs no label column. Malformed rows are listed in `bad_rows`. A file whose share of
    bad rows reaches `max_bad_rows` is rejected.

    Raises DataError (one line that names the place) if the file is not a readable file of this format.
    """
    with TableReader(path, task, labeled=labeled, max_bad_rows=max_bad_rows) as reader:
        (table,) = reader.chunks(sys.maxsize)
    return table


class TableReader:
    """Reads a data file in chunks of rows, in bounded memory. Use it as a context manager.

    `size` is the file's size and `position` the number of bytes read so far.
    """

    def __init__(
        self, path: str | os.PathLike[str], task: str | FileFormat, *, labeled: bool = True, max_bad_rows: float = 0.01
    ) -> None:
        self.layout = format_of(task)
        self.labeled = labeled and self.layout.label is not None
        self.max_bad_rows = max_bad_rows
        self.path = Path(path)
        self._file = open_regular(self.path)
        self.size = os.fstat(self._file.fileno()).st_size
        self.position = 0
        try:
            self._lines = _Lines(self._file, self.path)
            self._columns, self._width = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TableReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def chunks(self, rows: int = CHUNK_ROWS) -> Iterator[Table]:
        """Yields tables of up to `rows` rows, bad rows included.

        Raises DataError at the end of the file if it has no rows or too many bad ones.
        """
        read = bad = 0
        first_bad: BadRow | None = None
        done = False
        while not done:
            good: list[tuple[int, list[str], float]] = []
            reported: list[BadRow] = []
            for line, raw in self._lines:
                try:
                    good.append((line, *self._parse(raw)))
                except ValueError as error:
                    reported.append(BadRow(self.path, line, str(error)))
                if len(good) + len(reported) == rows:
                    break
            else:
                done = True
            self.position = self._lines.position
            read += len(good) + len(reported)
            bad += len(reported)
            first_bad = first_bad or next(iter(reported), None)
            if good or reported:
                yield self._table(good, tuple(reported))
        check_bad_rows(self.path, read, bad, first_bad, self.max_bad_rows)

    def _read_header(self) -> tuple[list[int], int]:
        """The positions of the columns that the format needs, and the number of columns."""
        try:
            line, raw = next(self._lines)
        except StopIteration:
            raise DataError(f"{show_path(self.path)}: empty file") from None
        place = f"{show_path(self.path)}:{line}"
        separator = self.layout.separator
        try:
            names = [name.strip() for name in self._lines.split(raw, separator, width=None)]
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        wanted = self.layout.columns(self.labeled)
        for name in wanted:
            if names.count(name) != 1:
                problem = "no column" if name not in names else "more than one column"
                kind = {"\t": "tab", ",": "comma"}.get(separator, show(separator))
                raise DataError(
                    f"{place}: {problem} {show(name)}; expected {kind}-separated columns "
                    f"{', '.join(wanted)}, found {show(separator.join(names), 100)}"
                )
        return [names.index(name) for name in wanted], len(names)

    def _parse(self, raw: Line) -> tuple[list[str], float]:
        """A row's id and sentences in the format's order, and its label. Raises ValueError with the reason."""
        fields = self._lines.split(raw, self.layout.separator, self._width)
        values = [fields[column] for column in self._columns]
        label = self.layout.label.parse(values.pop()) if self.labeled and self.layout.label else 0.0
        return values, label

    def _table(self, good: list[tuple[int, list[str], float]], reported: tuple[BadRow, ...]) -> Table:
        label = self.layout.label
        first = 1 if self.layout.id_column else 0
        return Table(
            task=self.layout.task,
            path=self.path,
            sentences=tuple([values[first + column] for _, values, _ in good] for column in range(self.layout.arity)),
            labels=np.array([y for _, _, y in good], dtype=label.dtype) if self.labeled and label else None,
            ids=[values[0].strip() if first else str(line) for line, values, _ in good],
            lines=np.array([line for line, _, _ in good], dtype=np.int64),
            bad_rows=reported,
        )


def check_bad_rows(path: Path, read: int, bad: int, first: BadRow | None, limit: float) -> None:
    """Raises DataError if the share of bad rows reaches `limit`, or if no good row is left."""
    if read == 0:
        raise DataError(f"{show_path(path)}: no rows after the header")
    if bad and (bad >= limit * read or bad == read):
        raise DataError(
            f"{show_path(path)}: {bad:,} of {read:,} rows are bad ({bad / read:.1%}; fewer than {limit:.1%} "
            f"are tolerated), the first at {first}"
        )


class _Lines:
    """Iterates over the non-blank lines of a file as (line number, line). Lines end in LF or CRLF."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._ahead: deque[Line] = deque()  # lines that were read but not yet yielded
        self._number = 0
        self.position = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> tuple[int, Line]:
        while True:
            raw = self._ahead.popleft() if self._ahead else self._read()
            if raw is None:
                raise StopIteration
            self._number += 1
            if self._number == 1 and isinstance(raw, bytes):
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw:
                return self._number, raw

    def split(self, raw: Line, separator: str, width: int | None) -> list[str]:
        """The fields of the line just yielded, `width` of them unless None. Raises ValueError with the reason.

        Consumes the following lines if a quoted field continues there.
        """
        text = _decode(raw)
        try:
            fields = _split_quoted(text, separator) if '"' in text else text.split(separator)
        except _OpenQuoteError as error:
            fields = self._join(text, separator, width)
            if not fields:
                raise ValueError(str(error)) from None
        if width is not None and len(fields) != width:
            raise ValueError(f"{len(fields)} fields, expected {width}")
        return fields

    def _join(self, text: str, separator: str, width: int | None) -> list[str]:
        """The fields of `text` and the following lines; none unless those lines close the open quote and the row."""
        for count, raw in enumerate(self._peek(), start=1):
            try:
                line = _decode(raw)
                text = f"{text}\n{line}"
                fields = _split_quoted(text, separator) if '"' in line else None
            except _OpenQuoteError:
                fields = None
            except ValueError:
                break
            if fields is None:  # the quote is still open: a field with a line break may have no separator
                if separator in line:
                    break
                continue
            if len(fields) != width or any("\n" in field and separator in field for field in fields):
                break
            for _ in range(count):
                self._ahead.popleft()
            self._number += count
            return fields
        return []

    def _peek(self) -> Iterator[Line]:
        """The next lines, up to MAX_RECORD_LINES, without consuming them."""
        for index in range(MAX_RECORD_LINES):
            if index == len(self._ahead):
                raw = self._read()
                if raw is None:
                    return
                self._ahead.append(raw)
            yield self._ahead[index]

    def _read(self) -> Line | None:
        """Reads the next line; None at the end of the file."""
        try:
            raw = self._file.readline(MAX_LINE_BYTES + 1)
            length = len(raw)
            if length > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = self._file.readline(MAX_LINE_BYTES)
                    length += len(rest)
                self.position += length
                return ValueError(f"a line of {length:,} bytes, expected at most {MAX_LINE_BYTES:,}")
        except OSError as error:
            place = f"{show_path(self._path)}:{self._number + 1}"
            raise DataError(f"{place}: cannot be read: {error.strerror or error}") from error
        self.position += length
        if not raw:
            return None
        return raw.removesuffix(b"\n").removesuffix(b"\r")


class _OpenQuoteError(ValueError):
    """The line ends inside a quoted field."""


def _decode(raw: Line) -> str:
    """A line's text. Raises ValueError with the reason if the line is too long or not UTF-8 text."""
    if isinstance(raw, ValueError):
        raise raw
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("UTF-16 text, expected UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8") from None
    if "\0" in text:
        raise ValueError(f"NUL character at offset {text.index(chr(0))}")
    return text


def _split_quoted(text: str, separator: str) -> list[str]:
    """The fields of a row with quotes. Raises _OpenQuoteError if a quote is not closed, ValueError for other errors."""
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
                raise _OpenQuoteError(f"a quote is opened and never closed: {show(text[begin:])}")
            fields.append(text[begin + 1 : end].replace('""', '"'))
            end += 1
            if end == len(text):
                return fields
            if text[end] != separator:
                raise ValueError(
                    f"text after a closing quote (quotes in a quoted field are doubled): {show(text[begin:])}"
                )
        begin = end + 1


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. Raises DataError for a directory, a FIFO or a device."""
    # Without O_NONBLOCK, opening a FIFO blocks until a writer opens it.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{show_path(path)}: cannot be opened: {reason}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a special file"
        raise DataError(f"{show_path(path)}: {kind}, expected a regular file")
    return os.fdopen(descriptor, "rb")
