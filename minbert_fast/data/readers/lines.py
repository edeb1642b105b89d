# SPDX-License-Identifier: Apache-2.0
"""The lines of a text file as bytes, and their decoding."""

from __future__ import annotations

from typing import BinaryIO

from minbert_fast.data.messages import DataError

MAX_LINE_BYTES = 1 << 20  # a longer line is reported as a bad row

Line = bytes | ValueError  # a line; an error in place of a line that is too long


class Lines:
    """Reads a file line by line. A line ends in LF; a byte order mark at the file's start is dropped."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.lines_read = 0
        self.position = 0  # bytes

    def read(self) -> Line | None:
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
            raise DataError(f"{self._name}:{self.lines_read + 1}: cannot be read: {error.strerror or error}") from error
        if not raw:
            return None
        self.position += length
        self.lines_read += 1
        if too_long:
            return ValueError(f"a line of {length:,} bytes, expected at most {MAX_LINE_BYTES:,}")
        return raw.removeprefix(b"\xef\xbb\xbf") if self.lines_read == 1 else raw


def without_end(raw: bytes) -> bytes:
    """A line without its LF or CRLF."""
    return raw.removesuffix(b"\n").removesuffix(b"\r")


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
