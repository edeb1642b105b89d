# SPDX-License-Identifier: Apache-2.0
"""Sentences from files of no task: a text file with one a line, or one column of a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from minbert_fast.data.files import TableReader, open_regular
from minbert_fast.data.formats import DataError, FileFormat, show, show_path

STANDARD_INPUT = Path("-")
TABLES = (".csv", ".tsv")  # files with a header line, tabs or commas between the columns


def read_sentences(path: Path, column: str | None = None, chunk: int = 16_384) -> Iterator[list[str]]:
    """Yields lists of up to `chunk` sentences: lines of a text file (`-`: standard input), or a table's `column`.

    An empty line is an empty sentence, so that sentence i is line i. A table without a `column` given is read by
    its column `sentence`, or by its only one. Raises DataError (one line, with the place) for what cannot be read; here no
    row is ever left out.
    """
    if path.suffix.lower() in TABLES:
        yield from _column(path, column, chunk)
        return
    if column is not None:
        raise DataError(f"{show_path(path)}: a column needs a file that ends in {' or '.join(TABLES)}")
    if path == STANDARD_INPUT:
        yield from _lines(sys.stdin.buffer, "standard input", chunk)
    else:
        with open_regular(path) as file:
            yield from _lines(file, show_path(path), chunk)


def _lines(file: BinaryIO, name: str, chunk: int) -> Iterator[list[str]]:
    done = 0
    while raw := list(islice(file, chunk)):
        sentences = []
        for line in raw:
            done += 1
            try:
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8-sig" if done == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = f"byte 0x{line[error.start]:02x} at offset {error.start} is not UTF-8"
                raise DataError(f"{name}:{done}: {bad}") from None
            sentences.append(text)
        yield sentences


def _column(path: Path, column: str | None, chunk: int) -> Iterator[list[str]]:
    with open_regular(path) as file:
        head = file.readline(1 << 20).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    separator = "\t" if "\t" in head else ","
    names = [name.strip().strip('"') for name in head.split(separator)]
    if column is None:
        column = names[0] if len(names) == 1 else "sentence"
        if column not in names:
            raise DataError(
                f"{show_path(path)}: which column? --column names one of {show(', '.join(filter(None, names)), 200)}"
            )
    layout = FileFormat(
        task="sentences", stem="", text_columns=(column,), label=None, id_column=None, separator=separator
    )
    with TableReader(path, layout) as reader:
        for table in reader.chunks(chunk):
            if table.bad_rows:
                raise DataError(str(table.bad_rows[0]))
            yield table.sentences[0]
