# SPDX-License-Identifier: Apache-2.0
"""Prediction files in the format of the course's graders, including its spaces and its misspelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common.storage import write_text


def write_predictions(path: Path, header: str, ids: Sequence[str], values: np.ndarray | Sequence[Any]) -> None:
    """Writes a file atomically: the line `id \\t <header> \\n`, then one line `{id} , {value} \\n` per row.

    Integers are written as whole numbers, other numbers as floats, text as it is. Raises ValueError if the numbers of ids
    and values differ, or if an id or a text contains a line break.
    """
    if len(ids) != len(values):
        raise ValueError(f"{path}: {len(ids)} ids for {len(values)} predictions")
    try:
        lines = [
            header_line(header),
            *map(row_line, ids, values.tolist() if isinstance(values, np.ndarray) else values),
        ]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_text(path, "".join(lines))


def header_line(header: str) -> str:
    """The first line of a prediction file."""
    return f"id \t {header} \n"


def row_line(identity: str, value: float | str) -> str:
    """The line of one prediction. Raises ValueError if the id or the value contains a line break."""
    for text in (identity, str(value)):
        if "\n" in text or "\r" in text:
            raise ValueError(f"line break in {'id' if text is identity else 'prediction'} {text!r}")
    return f"{identity} , {value} \n"
