# SPDX-License-Identifier: Apache-2.0
"""Plain text: one sentence a line, in the column `text`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from minbert_fast.data.messages import DataError
from minbert_fast.data.readers.lines import FileRecords, decode
from minbert_fast.data.readers.records import Record

COLUMN = "text"


class TextRecords(FileRecords):
    """The lines of a text file; blank lines are no rows unless `blank` is set."""

    def __init__(self, path: Path, blank: bool = False) -> None:
        super().__init__(path)
        self.names = (COLUMN,)
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
