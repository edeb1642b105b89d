# SPDX-License-Identifier: Apache-2.0
"""Formats of the data files, the search for files in a directory, and the wording of error messages.

A format is data: columns, separator, the label's range. A new kind of file is one more FileFormat (`add_format`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

# float() would also accept nan, 1_0 and more.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)


class DataError(ValueError):
    """A data or tokenizer file cannot be used; the message is one line with the place and the reason."""


@dataclass(frozen=True)
class Label:
    """The label column of a format: numbers from `low` to `high`, whole numbers only if `whole`."""

    column: str
    low: int
    high: int
    whole: bool
    dtype: str  # of the label array: int64 for classes, float32 for regression and pair tasks

    def parse(self, text: str) -> float:
        """The label in `text`. Raises ValueError with the value and what was expected."""
        kind = "a whole number" if self.whole else "a number"
        if _NUMBER.fullmatch(text.strip()):
            value = float(text)
            if self.low <= value <= self.high and (not self.whole or value == int(value)):
                return value
        raise ValueError(f"{self.column} is {show(text)}, expected {kind} from {self.low} to {self.high}")


@dataclass(frozen=True)
class FileFormat:
    """The format of one task's files."""

    task: str
    stem: str  # files are called {stem}-{split}.csv
    text_columns: tuple[str, ...]  # one per sentence of an example
    label: Label | None
    id_column: str | None = "id"  # None: the line number is the id
    separator: str = "\t"

    @property
    def arity(self) -> int:
        """Sentences per example."""
        return len(self.text_columns)

    def names(self, split: str) -> tuple[str, ...]:
        """File names of a split in order of preference; the course calls its unlabelled tests `test-student`."""
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
    """Registers a format under `layout.task`. Raises ValueError if that name has a different format."""
    if _KNOWN.setdefault(layout.task, layout) != layout:
        raise ValueError(f"the files of {layout.task!r} have another format already")


def format_of(task: str | FileFormat) -> FileFormat:
    """The format registered for a task name. Raises DataError for an unknown name."""
    if isinstance(task, FileFormat):
        return task
    if task not in FORMATS:
        raise DataError(f"no task is called {show(task)}; known are {', '.join(FORMATS)}")
    return FORMATS[task]


@dataclass(frozen=True)
class Discovery:
    """The files of a split by task, in the requested order, and notices for the user."""

    paths: dict[str, Path]
    notices: tuple[str, ...]


def find_tables(
    directory: str | os.PathLike[str], split: str = "train", tasks: tuple[str, ...] = MAIN_TASKS
) -> Discovery:
    """Finds the files of `tasks` in a data directory; a task without a file is omitted with a notice.

    Raises DataError if `directory` is not a directory or has no file for any task.
    """
    folder = Path(directory)
    if not os.path.isdir(folder):
        problem = "is not a directory" if os.path.exists(folder) else "does not exist"
        raise DataError(f"{show_path(folder)}: {problem}; expected a directory of data files")
    paths: dict[str, Path] = {}
    notices: list[str] = []
    wanted = {layout.task: layout.names(split) for layout in map(format_of, tasks)}
    for task, names in wanted.items():
        path = next((folder / name for name in names if os.path.exists(folder / name)), None)
        if path:
            paths[task] = path
        else:
            notices.append(f"no {' or '.join(names)} in {show_path(folder)}: task {task} is left out")
    if not paths:
        expected = ", ".join(name for names in wanted.values() for name in names)
        raise DataError(f"{show_path(folder)}: no data files; expected one or more of {expected}")
    return Discovery(paths, tuple(notices))


def show(value: str, limit: int = 60) -> str:
    """A value for a message: quoted, on one line, cut to `limit` characters."""
    return ascii(value) if len(value) <= limit else f"{value[:limit]!a}..."


def show_path(path: os.PathLike[str] | str) -> str:
    """A path for a message: unchanged if printable, else quoted."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)
