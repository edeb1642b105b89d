# SPDX-License-Identifier: Apache-2.0
"""Prediction files in the format of the course's graders, including its spaces and its misspelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minbert_fast.common.storage import write_text


def write_predictions(path: Path, header: str, ids: Sequence[str], values: np.ndarray) -> None:
    """Writes a file atomically: the line `id \\t <header> \\n`, then one line `{id} , {value} \\n` per row.

    Integer arrays (classes) are written as whole numbers, other arrays as floats. Raises ValueError if the numbers of ids
    and values differ, or if an id contains a line break.
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
    """The line of one prediction. Raises ValueError if the id contains a line break."""
    if "\n" in identity or "\r" in identity:
        raise ValueError(f"line break in id {identity!r}")
    return f"{identity} , {value} \n"
