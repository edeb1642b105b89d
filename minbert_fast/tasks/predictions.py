# SPDX-License-Identifier: Apache-2.0
"""Prediction files exactly as the course's graders read them, spaces and misspelling included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minbert_fast.common.storage import write_text


def write(path: Path, header: str, ids: Sequence[str], values: np.ndarray) -> None:
    """Writes `id \\t <header> \\n`, then `{id} , {value} \\n` a row; whole files appear or none (atomic rename).

    Classes (an integer array) print as whole numbers, anything else as a float. Raises ValueError where the number of
    ids and values differs, or where an id holds a line break.
    """
    if len(ids) != len(values):
        raise ValueError(f"{path}: {len(ids)} ids for {len(values)} predictions")
    try:
        lines = [header_line(header), *map(row_line, ids, values.tolist())]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_text(path, "".join(lines))


def header_line(header: str) -> str:
    """The first line of a prediction file."""
    return f"id \t {header} \n"


def row_line(identity: str, value: float) -> str:
    """The line of one prediction. Raises ValueError where the id holds a line break."""
    if "\n" in identity or "\r" in identity:
        raise ValueError(f"line break in id {identity!r}")
    return f"{identity} , {value} \n"


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids and values (fp64) of a prediction file. Raises ValueError naming file and line where it is malformed."""
    ids, values = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
        row, comma, value = line.rpartition(" , ")
        try:
            if not comma:
                raise ValueError
            values.append(float(value))
        except ValueError:
            raise ValueError(f"{path}:{number}: expected '<id> , <prediction>', found {line!r}") from None
        ids.append(row)
    return ids, np.array(values)
