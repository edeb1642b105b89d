# SPDX-License-Identifier: Apache-2.0
"""JSON lines: one object a line. A column is a key; dots lead into nested objects (`meta.label`)."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.lines import Line, Lines, decode, without_end
from minbert_fast.data.readers.records import FileRecords, Record

SEARCHED_LINES = 100  # the columns are the keys of the first object among this many lines


class JsonRecords(FileRecords):
    """The rows of a JSON lines file. `names` are the keys of the first object; later ones may have others."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kind = "keys"
        self._lines = Lines(self.file, self.name)
        self._ahead: deque[tuple[int, Line]] = deque()
        self.place = f"{self.name}:1"

    def begin(self) -> None:
        for _ in range(SEARCHED_LINES):
            found = self._read()
            if found is None:
                break
            self._ahead.append(found)
            number, raw = found
            if isinstance(raw, bytes) and raw.startswith(b"["):
                raise DataError(f"{self.name}:{number}: a JSON array, expected JSON lines: one object a line")
            try:
                self.names = list(parse_object(decode(raw)))
            except ValueError:
                continue
            self.place = f"{self.name}:{number}"
            break
        if not self._ahead:
            raise DataError(f"{self.name}: empty file")

    def problem(self, column: str) -> str:
        """Nothing: each row says whether it has the key."""
        return ""

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        while (found := self._ahead.popleft() if self._ahead else self._read()) is not None:
            number, raw = found
            self.position = self._lines.position
            try:
                row = parse_object(decode(raw))
                yield number, [value_of(row, column) for column in columns]
            except ValueError as error:
                yield number, error
        self.position = self._lines.position

    def _read(self) -> tuple[int, Line] | None:
        """The next line that is not blank, and its number."""
        while (raw := self._lines.read()) is not None:
            if isinstance(raw, bytes):
                raw = without_end(raw)
            if isinstance(raw, ValueError) or raw.strip():
                return self._lines.lines_read, raw
        return None


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises ValueError with the reason."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}: {show(text)}") from None
    except RecursionError:
        raise ValueError(f"nested too deeply: {show(text)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {show(text)}")
    return value


def value_of(row: Mapping[Any, Any], column: str) -> Any:
    """The value under a key, or under keys joined with dots. Raises ValueError if there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"no key {show(column)}, found {show(', '.join(map(str, row)), 100)}")
        value = value[key]
    return value
