# SPDX-License-Identifier: Apache-2.0
"""Reads sentences for `encode`: from a text file with one sentence per line, or from one column of a table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from minbert_fast.data.files import TableReader, open_regular
from minbert_fast.data.formats import DataError, FileFormat, show, show_path

STANDARD_INPUT = Path("-")
TABLES = (".csv", ".tsv")  # files with a header line; columns are separated by tabs or commas
CHUNK = 16_384  # sentences


def read_sentences(path: Path, column: str | None = None) -> Iterator[list[str]]:
    """Yields lists of sentences: the lines of a text file (`-`: standard input), or a table's `column`.

    An empty line is an empty sentence, so sentence i is line i. The default column of a table is `sentence`, or its only
    column. Raises DataError (one line that names the place) for the first line that cannot be read.
    """
    if path.suffix.lower() in TABLES:
        yield from _read_column(path, column)
        return
    if column is not None:
        raise DataError(f"{show_path(path)}: a column needs a file that ends in {' or '.join(TABLES)}")
    if path == STANDARD_INPUT:
        yield from _read_lines(sys.stdin.buffer, "standard input")
    else:
        with open_regular(path) as file:
            yield from _read_lines(file, show_path(path))


def _read_lines(file: BinaryIO, name: str) -> Iterator[list[str]]:
    done = 0
    while raw := list(islice(file, CHUNK)):
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


def _read_column(path: Path, column: str | None) -> Iterator[list[str]]:
    with open_regular(path) as file:
        head = file.readline(1 << 20).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    separator = "\t" if "\t" in head else ","
    names = [name.strip().strip('"') for name in head.split(separator)]
    if column is None:
        column = names[0] if len(names) == 1 else "sentence"
        if column not in names:
            known = show(", ".join(filter(None, names)), 200)
            raise DataError(f"{show_path(path)}: which column? --column names one of {known}")
    layout = FileFormat("sentences", "", (column,), label=None, id_column=None, separator=separator)
    with TableReader(path, layout) as reader:
        for table in reader.chunks(CHUNK):
            if table.bad_rows:
                raise DataError(str(table.bad_rows[0]))
            yield table.sentences[0]
