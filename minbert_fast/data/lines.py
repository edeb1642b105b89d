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
from minbert_fast.data.readers.records import STANDARD_INPUT, Record, Records, name_of
from minbert_fast.data.readers.text import COLUMN, TextRecords

CHUNK = 16_384  # sentences


def read_sentences(path: Path, column: str | None = None) -> Iterator[list[str]]:
    """Yields lists of sentences: the lines of a text file, or one column of CSV, TSV, JSON lines or Parquet.

    An empty line of a text file is an empty sentence, so sentence i is line i. The default column is `text`, `sentence`, or
    the only one. Standard input is JSON lines if it begins with `{`, else CSV or TSV if a column is named, else text.
    Raises DataError (one line that names the place) for the first line that cannot be read.
    """
    form = _format_of(path, column)
    if form == "text":
        if column is not None:
            endings = ", ".join(ending for ending, kind in ENDINGS.items() if kind != "text")
            raise DataError(f"{name_of(path)}: a column needs a file that ends in one of {endings}")
        records: Records = TextRecords(path, blank=True)
    else:
        records = Input(name_of(path), Layout("sentences", format=form), 1, (path,)).open()
    try:
        if form == "text":
            column = COLUMN
        elif column is None:
            column = _usual_column(records)
        elif problem := records.problem(column):
            raise DataError(f"{records.place}: {problem} {show(column)}, found {_names(records)}")
        rows = records.rows([column])
        while chunk := list(islice(rows, CHUNK)):
            yield [_sentence(records, column, row, form == "text") for row in chunk]
    finally:
        records.close()


def _format_of(path: Path, column: str | None) -> Kind:
    if path == STANDARD_INPUT:
        return "jsonl" if first_byte_of_input() == b"{" else "text" if column is None else "csv"
    return ENDINGS.get(path.suffix.lower(), "text")


def _usual_column(records: Records) -> str:
    """The column that is read where none is named."""
    known = [str(name) for name in records.names]
    usual = [*(name for (name,) in usual_names(1)), *(known if len(known) == 1 else ())]
    found = next((name for name in usual if name in known), "")
    if found:
        return str(found)
    raise DataError(f"{records.place}: which column? --column names one of {_names(records)}")


def _names(records: Records) -> str:
    return show(", ".join(filter(None, map(str, records.names))), 200)


def _sentence(records: Records, column: str, row: Record, lines: bool) -> str:
    """The sentence of a row. Raises DataError if the row cannot be read, or is JSON in a text file."""
    number, values = row
    try:
        if isinstance(values, ValueError):
            raise values
        text = text_of(column, values[0])
    except ValueError as error:
        raise DataError(f"{records.name}:{number}: {error}") from None
    if lines and number == 1 and _is_object(text):
        raise DataError(
            f"{records.name}:1: JSON lines, expected a sentence; rename the file to .jsonl, and use --column"
        )
    return text


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and bool(parse_object(text))
    except ValueError:
        return False
