# SPDX-License-Identifier: Apache-2.0
"""Text files, line by line: the base of all readers of text formats, and the reader of plain text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from minbert_fast.data.messages import DataError
from minbert_fast.data.readers.records import STANDARD_INPUT, Record, Records, check_text, name_of, open_source

MAX_LINE_BYTES = 1 << 20  # a longer line is reported as a bad row

Line = bytes | ValueError  # a line; an error in place of a line that is too long


class FileRecords(Records):
    """The rows of a text file, which is read line by line. A line ends in LF; a byte order mark at the start is dropped."""

    def __init__(self, path: Path) -> None:
        self.name = self.place = name_of(path)
        self._file = open_source(path)
        self._is_own = path != STANDARD_INPUT
        self.size = os.fstat(self._file.fileno()).st_size if self._is_own else 0
        self.lines_read = 0

    def _read_line(self) -> Line | None:
        """The next line with its end; None at the end of the file. Raises DataError if the file cannot be read."""
        try:
            raw = self._file.readline(MAX_LINE_BYTES + 1)
            length = len(raw)
            too_long = length > MAX_LINE_BYTES and not raw.endswith(b"\n")
            if too_long:
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = self._file.readline(MAX_LINE_BYTES)
                    length += len(rest)
        except OSError as error:
            raise DataError(f"{self.name}:{self.lines_read + 1}: cannot be read: {error.strerror or error}") from error
        if not raw:
            return None
        self.position += length
        self.lines_read += 1
        if self.lines_read == 1:
            check_text(raw, self.name)
        if too_long:
            return ValueError(f"a line of {length:,} bytes, expected at most {MAX_LINE_BYTES:,}")
        return raw.removeprefix(b"\xef\xbb\xbf") if self.lines_read == 1 else raw

    def numbered_lines(self) -> Iterator[tuple[int, Line]]:
        """The number of each further line, and the line without its end."""
        return ((self.lines_read, without_end(raw)) for raw in self.raw_lines())

    def raw_lines(self) -> Iterator[Line]:
        """The further lines with their ends. Raises DataError if the file cannot be read on."""
        while (raw := self._read_line()) is not None:
            yield raw

    def close(self) -> None:
        """Closes the file, but not standard input."""
        if self._is_own:
            self._file.close()


class TextRecords(FileRecords):
    """Plain text: a sentence a line, in the column `text`; blank lines are no rows unless `blank` is set."""

    names = ("text",)

    def __init__(self, path: Path, blank: bool = False) -> None:
        super().__init__(path)
        self._blank = blank

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        for number, raw in self.numbered_lines():
            try:
                text = decode(raw)
            except ValueError as error:
                yield number, error
            else:
                if self._blank or text.strip():
                    yield number, [text] * len(columns)
        if self.lines_read == 0 and not self._blank:
            raise DataError(f"{self.name}: empty file")


def without_end(raw: Line) -> Line:
    """A line without its LF or CRLF."""
    return raw.removesuffix(b"\n").removesuffix(b"\r") if isinstance(raw, bytes) else raw


def decode(raw: Line) -> str:
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
