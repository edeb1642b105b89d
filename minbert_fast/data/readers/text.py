# SPDX-License-Identifier: Apache-2.0
"""Plain text: one sentence a line, in the column `text`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from minbert_fast.data.messages import DataError
from minbert_fast.data.readers.lines import Lines, decode, without_end
from minbert_fast.data.readers.records import FileRecords, Record

COLUMN = "text"


class TextRecords(FileRecords):
    """The lines of a text file; blank lines are no rows unless `blank` is set."""

    def __init__(self, path: Path, blank: bool = False) -> None:
        super().__init__(path)
        self.place = self.name
        self.names = (COLUMN,)
        self._blank = blank
        self._lines = Lines(self.file, self.name)

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        while (raw := self._lines.read()) is not None:
            number = self._lines.lines_read
            self.position = self._lines.position
            try:
                text = decode(without_end(raw) if isinstance(raw, bytes) else raw)
            except ValueError as error:
                yield number, error
            else:
                if self._blank or text.strip():
                    yield number, [text] * len(columns)
        if self._lines.lines_read == 0 and not self._blank:
            raise DataError(f"{self.name}: empty file")
