# SPDX-License-Identifier: Apache-2.0
"""The interface of all readers, and the opening of regular files and standard input."""

from __future__ import annotations

import os
import re
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from minbert_fast.data.messages import DataError, show_path

STANDARD_INPUT = Path("-")

_DECOMPRESS = "decompress it"
_NOT_TEXT = {  # a pattern of how files begin: what they are, and what to do instead
    rb"\x1f\x8b": ("a gzip file", _DECOMPRESS),
    rb"BZh[1-9]1AY&SY": ("a bzip2 file", _DECOMPRESS),
    rb"\xfd7zXZ\0": ("an xz file", _DECOMPRESS),
    rb"\x28\xb5\x2f\xfd": ("a Zstandard file", _DECOMPRESS),
    rb"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or save the spreadsheet as CSV"),
    rb"\xd0\xcf\x11\xe0": ("an Excel spreadsheet", "save it as CSV"),
    rb"PAR1[\x00-\x08\x0e-\x1f]": ("a Parquet file", 'name it .parquet, or set format = "parquet"'),
}

#: A row: the line where it begins, and the values of the wanted columns, or why they cannot be read.
Record = tuple[int, Sequence[Any] | ValueError]


class Records(ABC):
    """The rows of one file: `begin` reads the names of its columns, `rows` the rows, `close` closes it."""

    name: str  # of the file, for messages
    place: str  # where the columns are named, for messages
    names: Sequence[str] = ()  # the columns
    names_vary: bool = False  # each row names its own columns; `names` are those of the first
    separator: str = ", "  # of names in messages
    kind: str = "columns"  # for messages, such as "comma-separated columns"
    size: int = 0  # bytes
    position: int = 0  # bytes read so far

    def begin(self) -> None:  # noqa: B027  # optional
        """Reads the names of the columns. Raises DataError if the file has none."""

    @abstractmethod
    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        """The rows in order. Raises DataError if the file cannot be read on."""

    def problem(self, column: str) -> str:
        """Why a column of this name cannot be read; empty if it can, or if each row says so."""
        if self.names_vary:
            return ""
        return {0: "no column", 1: ""}.get(list(self.names).count(column), "more than one column")

    def close(self) -> None:  # noqa: B027  # optional
        """Closes the file."""


def check_text(first: bytes, name: str) -> None:
    """Raises DataError if `first`, the first bytes of a file, are those of a format that is not text."""
    for start, (found, instead) in _NOT_TEXT.items():
        if re.match(start, first):
            raise DataError(f"{name}: {found}, expected plain text; {instead}")


def name_of(path: Path) -> str:
    """A path for messages."""
    return "standard input" if path == STANDARD_INPUT else show_path(path)


def open_source(path: Path) -> BinaryIO:
    """The open file; `-` is standard input. Raises DataError."""
    if path != STANDARD_INPUT:
        return open_regular(path)
    if sys.stdin is None:  # the process was started without one
        raise DataError("standard input: closed, expected data")
    return sys.stdin.buffer


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
