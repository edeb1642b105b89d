# SPDX-License-Identifier: Apache-2.0
"""What the course's data files look like, where they lie, and how complaints about them are worded.

A format is data: columns, separator, the label's range. Adding a task's files is adding a line to FORMATS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)  # float() takes far more: nan, 1_0, ...


class DataError(ValueError):
    """A data or tokenizer file that cannot be used; the message is one line with the place and the reason."""


@dataclass(frozen=True)
class Label:
    """The label column of a format: numbers from `low` to `high`, whole ones only if `whole`."""

    column: str
    low: int
    high: int
    whole: bool
    dtype: str  # of the label array: int64 for classes, float32 for what a pair task regresses on

    def parse(self, text: str) -> float:
        """The label in `text`. Raises ValueError with the reason: the value, and what was expected."""
        kind = "a whole number" if self.whole else "a number"
        if _NUMBER.fullmatch(text.strip()):
            value = float(text)
            if self.low <= value <= self.high and (not self.whole or value == int(value)):
                return value
        raise ValueError(f"{self.column} is {show(text)}, expected {kind} from {self.low} to {self.high}")


@dataclass(frozen=True)
class FileFormat:
    """What one task's files look like."""

    task: str
    stem: str  # files are called {stem}-{split}.csv
    text_columns: tuple[str, ...]  # one a sentence of the example
    label: Label | None
    id_column: str | None = "id"  # None: the line number serves
    separator: str = "\t"

    @property
    def arity(self) -> int:
        """Sentences of an example."""
        return len(self.text_columns)

    def names(self, split: str) -> tuple[str, ...]:
        """File names of a split by preference; the course calls its unlabeled tests `test-student`."""
        names = (f"{self.stem}-{split}.csv",)
        return (*names, f"{self.stem}-test-student.csv") if split == "test" else names

    def columns(self, labeled: bool) -> tuple[str, ...]:
        """The columns that a file must have."""
        label = (self.label.column,) if labeled and self.label else ()
        return ((self.id_column,) if self.id_column else ()) + self.text_columns + label


_PAIR = ("sentence1", "sentence2")
_KNOWN = {
    layout.task: layout
    for layout in (
        FileFormat("sentiment", "ids-sst", ("sentence",), Label("sentiment", 0, 4, True, "int64")),
        FileFormat("paraphrase", "quora", _PAIR, Label("is_duplicate", 0, 1, True, "float32")),
        FileFormat("similarity", "sts", _PAIR, Label("similarity", 0, 5, False, "float32")),
        FileFormat("polarity", "ids-cfimdb", ("sentence",), Label("sentiment", 0, 1, True, "int64")),
        FileFormat("triplets", "nli-triplets", ("sent0", "sent1", "hard_neg"), None, None, ","),
    )
}
FORMATS: Mapping[str, FileFormat] = MappingProxyType(_KNOWN)
MAIN_TASKS = ("sentiment", "paraphrase", "similarity")


def add_format(layout: FileFormat) -> None:
    """Makes the files of another task known, under `layout.task`. Raises ValueError where that name is taken."""
    if _KNOWN.setdefault(layout.task, layout) != layout:
        raise ValueError(f"the files of {layout.task!r} have another format already")


def format_of(task: str | FileFormat) -> FileFormat:
    """The format of a task given by name. Raises DataError for an unknown name."""
    if isinstance(task, FileFormat):
        return task
    if task not in FORMATS:
        raise DataError(f"no task is called {show(task)}; known are {', '.join(FORMATS)}")
    return FORMATS[task]


@dataclass(frozen=True)
class Discovery:
    """The files found for a split, by task in the order asked for, and what to tell the user."""

    paths: dict[str, Path]
    notices: tuple[str, ...]


def find_tables(
    directory: str | os.PathLike[str], split: str = "train", tasks: tuple[str, ...] = MAIN_TASKS
) -> Discovery:
    """Looks for the files of `tasks` in a data directory; a task without a file is dropped with a notice.

    Raises DataError if `directory` is none, or has a file for no task at all.
    """
    folder = Path(directory)
    if not os.path.isdir(folder):
        problem = "is not a directory" if os.path.exists(folder) else "does not exist"
        raise DataError(f"{show_path(folder)}: {problem}; expected a directory of data files")
    paths: dict[str, Path] = {}
    notices: list[str] = []
    for layout in map(format_of, tasks):
        names = layout.names(split)
        found = next((folder / name for name in names if os.path.exists(folder / name)), None)
        if found:
            paths[layout.task] = found
        else:
            notices.append(f"no {' or '.join(names)} in {show_path(folder)}: task {layout.task} is left out")
    if not paths:
        names = tuple(name for layout in map(format_of, tasks) for name in layout.names(split))
        raise DataError(f"{show_path(folder)}: no data files; expected one or more of {', '.join(names)}")
    return Discovery(paths, tuple(notices))


def show(value: str, limit: int = 60) -> str:
    """A value for a message: quoted, on one line, cut to `limit` characters."""
    return ascii(value) if len(value) <= limit else f"{value[:limit]!a}..."


def show_path(path: os.PathLike[str] | str) -> str:
    """A path for a message: as it is where it can be printed, else quoted."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)
