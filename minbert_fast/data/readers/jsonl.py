# SPDX-License-Identifier: Apache-2.0
"""JSON lines: one object a line. A column is a key; dots lead into nested objects (`meta.label`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.lines import FileRecords, Line, decode
from minbert_fast.data.readers.records import Record

SEARCHED_LINES = 100  # the columns are the keys of the first object among this many lines


class JsonRecords(FileRecords):
    """The rows of a JSON lines file. `names` are the keys of the first object; later ones may have others."""

    kind = "keys"
    names_vary = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        lines = self.numbered_lines()
        self._lines: Iterator[tuple[int, Line]] = (
            (number, raw) for number, raw in lines if isinstance(raw, ValueError) or raw.strip()
        )

    def begin(self) -> None:
        searched: list[tuple[int, Line]] = []
        problem = ""
        for number, raw in islice(self._lines, SEARCHED_LINES):
            searched.append((number, raw))
            if isinstance(raw, bytes) and raw.startswith(b"["):
                raise DataError(f"{self.name}:{number}: a JSON array, expected JSON lines: one object a line")
            try:
                self.names = list(parse_object(decode(raw)))
            except ValueError as error:
                problem = problem or f"{self.name}:{number}: {error}; expected JSON lines: one object a line"
                continue
            self.place = f"{self.name}:{number}"
            break
        else:
            raise DataError(problem or f"{self.name}: empty file")
        self._lines = chain(searched, self._lines)

    def rows(self, columns: Sequence[str]) -> Iterator[Record]:
        for number, raw in self._lines:
            try:
                row = parse_object(decode(raw))
                yield number, [value_of(row, column) for column in columns]
            except ValueError as error:
                yield number, error


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
