# SPDX-License-Identifier: Apache-2.0
"""Reads sentences for `encode`: from a text file with one sentence per line, or from one column of another file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from minbert_fast.data.columns import usual_names
from minbert_fast.data.files import text_of
from minbert_fast.data.formats import Kind, Layout
from minbert_fast.data.inputs import ENDINGS, Input, first_byte_of_input
from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.jsonl import parse_object
from minbert_fast.data.readers.lines import TextRecords
from minbert_fast.data.readers.records import STANDARD_INPUT, Record, Records, name_of

CHUNK = 16_384  # sentences


def read_sentences(path: Path, column: str | None = None) -> Iterator[list[str]]:
    """Yields lists of sentences: the lines of a text file, or one column of CSV, TSV, JSON lines or Parquet.

    An empty line of a text file is an empty sentence, so sentence i is line i. The default column is `text`, `sentence`, or
    the only one. Standard input is JSON lines if it begins with `{`, else CSV or TSV if a column is named, else text.
    Raises DataError (one line that names the place) for the first line that cannot be read.
    """
    if path == STANDARD_INPUT:
        form: Kind = "jsonl" if first_byte_of_input() == b"{" else "text" if column is None else "csv"
    else:
        form = ENDINGS.get(path.suffix.lower(), "text")
    if form == "text" and column is not None:
        endings = ", ".join(ending for ending, kind in ENDINGS.items() if kind != "text")
        raise DataError(f"{name_of(path)}: a column needs a file that ends in one of {endings}")
    source = Input(name_of(path), Layout("sentences", format=form), 1, (path,))
    records = TextRecords(path, blank=True) if form == "text" else source.open()
    try:
        names = list(map(str, records.names))
        found = show(", ".join(filter(None, names)), 200)
        if column is None:
            usual = [*(name for (name,) in usual_names(1)), *(names if len(names) == 1 else ())]
            column = next((name for name in usual if name in names), None)
            if not column:
                raise DataError(f"{records.place}: which column? --column names one of {found}")
        if problem := records.problem(column):
            raise DataError(f"{records.place}: {problem} {show(column)}, found {found}")
        rows = records.rows([column])
        while chunk := list(islice(rows, CHUNK)):
            yield [_sentence(records, column, row) for row in chunk]
    finally:
        records.close()


def _sentence(records: Records, column: str, row: Record) -> str:
    """The sentence of a row. Raises DataError if the row cannot be read, or is JSON in a text file."""
    line, values = row
    try:
        if isinstance(values, ValueError):
            raise values
        text = text_of(column, values[0])
    except ValueError as error:
        raise DataError(f"{records.name}:{line}: {error}") from None
    if line == 1 and isinstance(records, TextRecords) and _is_object(text):
        raise DataError(
            f"{records.name}:1: JSON lines, expected a sentence; rename the file to .jsonl, and use --column"
        )
    return text


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and bool(parse_object(text))
    except ValueError:
        return False
