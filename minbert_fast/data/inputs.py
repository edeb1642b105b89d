# SPDX-License-Identifier: Apache-2.0
"""Finds and opens the data of a source: files, one split of a hub data set, or rows in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from minbert_fast.common.schema import ConfigError, check
from minbert_fast.data.columns import LABEL, choose_columns, usual_names
from minbert_fast.data.formats import Kind, Layout, format_of
from minbert_fast.data.labels import Label, label_text
from minbert_fast.data.messages import DataError
from minbert_fast.data.readers.columnar import DatasetRecords, ParquetRecords
from minbert_fast.data.readers.course import CourseRecords
from minbert_fast.data.readers.delimited import DelimitedRecords
from minbert_fast.data.readers.hub import load_split
from minbert_fast.data.readers.jsonl import JsonRecords
from minbert_fast.data.readers.lines import TextRecords
from minbert_fast.data.readers.records import (
    STANDARD_INPUT,
    Records,
    check_text,
    name_of,
    open_regular,
    open_source,
)
from minbert_fast.data.readers.rows import is_dataset, memory_records
from minbert_fast.data.source import Source, as_tuple

ENDINGS: dict[str, Kind] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
}


@dataclass(frozen=True, eq=False)
class Input:
    """Data that are ready to be read: their place, their layout, and the number of texts of an example."""

    name: str  # for messages and file names
    layout: Layout
    texts: int
    files: tuple[Path, ...] = ()  # read one after the other; `-` is standard input
    rows: Any = None  # instead of files: rows in memory, or a split of a hub data set
    stored: bool = True  # False: rows in memory, whose tokens stay in memory

    @property
    def path(self) -> Path:
        """The file's path, or the name of what is not a file."""
        return self.files[0] if len(self.files) == 1 and self.files[0] != STANDARD_INPUT else Path(self.name)

    @property
    def size(self) -> int:
        """Bytes of the files that exist."""
        return sum(file.stat().st_size for file in self.files if file.exists())

    @property
    def parts(self) -> tuple[Input, ...]:
        """One input for each file."""
        if len(self.files) < 2:
            return (self,)
        return tuple(replace(self, name=name_of(file), files=(file,)) for file in self.files)

    @property
    def format(self) -> Kind:
        """The format of the only file. Raises DataError if its ending does not say."""
        (file,) = self.files
        if self.layout.format != "auto":
            return self.layout.format
        ending = file.suffix.lower()
        if file == STANDARD_INPUT:
            return "jsonl" if first_byte_of_input() == b"{" else "csv"
        if ending not in ENDINGS:
            with open_regular(file) as opened:
                check_text(opened.peek(), self.name)
            raise DataError(f"{self.name}: ends in none of {', '.join(ENDINGS)}; rename it, or set format in its data")
        return ENDINGS[ending]

    def open(self) -> Records:
        """Opens the only file, or the rows, and reads the names of the columns. Raises DataError."""
        records = self._records()
        try:
            records.begin()
        except BaseException:
            records.close()
            raise
        return records

    def _records(self) -> Records:
        if not self.files:
            names = self.layout.texts or usual_names(self.texts)[0]
            return memory_records(self.rows, self.name, names, self.layout.label[:1] or (LABEL,))
        (file,), layout, form = self.files, self.layout, self.format
        if form == "jsonl":
            return JsonRecords(file)
        if form == "text":
            return TextRecords(file)
        if form == "parquet":
            if file == STANDARD_INPUT:
                raise DataError("standard input: Parquet needs a file")
            return ParquetRecords(file, self.name)
        separator = layout.separator or ("\t" if form == "tsv" else "")
        if layout.quoting == "course":
            return CourseRecords(file, separator or ",")
        return DelimitedRecords(file, layout, separator)

    def fingerprint(self, labeled: bool) -> str:
        """A hash of the content of rows that are no file: the columns that are read."""
        digest = hashlib.blake2b(digest_size=16)
        records = self.open()
        columns = choose_columns(records, self.layout, self.texts, labeled)
        for _, values in records.rows(columns.all):
            digest.update(repr(values).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def file_input(path: Path | str, layout: str | Layout) -> Input:
    """A file of a layout that names its text columns."""
    layout = format_of(layout)
    return Input(name_of(Path(path)), layout, layout.arity, (Path(path),))


def find_input(source: Source, split: str, texts: int = 0, *, rows: object = None) -> Input | None:
    """The data of a split (train, dev or test) that `source` names; None if it names none.

    `texts` is the number of texts of an example (0: as many as the source names, else 1). `rows` are rows in memory in
    place of files: a list of dicts or of tuples (texts, then label), a dict of lists, a pandas DataFrame, a
    datasets.Dataset.

    Files are opened when they are read. Raises ConfigError for a source that does not fit the task, DataError for a hub
    data set that cannot be loaded.
    """
    layout = layout_of(source)
    texts = texts or layout.arity or 1
    named = f"layout = {source.layout!r}" if source.layout and not source.texts else f"text = {list(layout.texts)}"
    check(layout.arity in (0, texts), f"{named}: {layout.arity} texts, expected {texts}")
    if rows is not None:
        return Input(f"{split}-rows", _with_classes(layout, rows), texts, rows=rows, stored=False)
    names = source.files(split)
    if source.hub:
        check(len(names) < 2, f"{split} = {list(names)}: expected one split")
        loaded = load_split(source.hub, source.config, split, names[0] if names else "")
        if loaded is None:
            return None
        name = "/".join(filter(None, (source.hub, source.config, loaded[0])))
        return Input(name, _with_classes(layout, loaded[1]), texts, rows=loaded[1])
    files = tuple(map(Path, names))
    if not files:
        return None
    return Input("+".join(map(name_of, files)), layout, texts, files)


def layout_of(source: Source) -> Layout:
    """The layout that the source names, with the keys that the source sets itself.

    Raises DataError for an unknown name, ConfigError for keys that do not go together.
    """
    base = format_of(source.layout) if source.layout else Layout("own")
    own: dict[str, Any] = {
        "texts": source.texts,
        "label": as_tuple(source.label),
        "id": source.id,
        "format": "" if source.format == "auto" else source.format,
        "separator": source.separator,
        "quoting": source.quoting,
        "columns": as_tuple(source.columns),
        "values": {label_text(label): value for label, value in source.values.items()},
        "skip": tuple(map(label_text, as_tuple(source.skip))),
    }
    layout = replace(base, **{key: value for key, value in own.items() if value})
    _check_delimited(source)
    several = len(layout.separator) > 1
    check(not several or layout.quoting == "none", f'separator = {layout.separator!r}: needs quoting = "none"')
    if isinstance(base.rule, Label) and layout.label != base.label:
        layout = replace(layout, rule=replace(base.rule, column=layout.label[0]))
    return layout


def _check_delimited(source: Source) -> None:
    """Raises ConfigError for keys of csv and tsv files in a source that has only files of other formats."""
    given = [key for key in ("separator", "quoting", "columns") if getattr(source, key)]
    named = [file for split in ("train", "dev", "test") for file in source.files(split)]
    formats = {source.format} if source.format != "auto" else {ENDINGS.get(Path(f).suffix.lower()) for f in named}
    if given and formats and formats <= {"jsonl", "parquet", "text"}:
        value, found = getattr(source, given[0]), " or ".join(sorted(map(str, formats)))
        raise ConfigError(f"{given[0]} = {value!r}: belongs to csv and tsv files, not to {found}")


def _with_classes(layout: Layout, rows: object) -> Layout:
    """The layout with the class names of a `datasets.Dataset`, unless it has its own."""
    if layout.classes or not is_dataset(rows):
        return layout
    label = layout.label[0] if layout.label else LABEL
    return replace(layout, classes=DatasetRecords(rows, "").class_names(label))


def first_byte_of_input() -> bytes:
    """The first byte of standard input, which stays to be read. Raises DataError if it is closed."""
    stream = open_source(STANDARD_INPUT)
    if isinstance(stream, BufferedReader):
        return stream.peek(1)[:1]
    at = stream.tell()
    first = stream.read(1)
    stream.seek(at)
    return first
