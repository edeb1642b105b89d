# SPDX-License-Identifier: Apache-2.0
"""How a data file is read (`Layout`), the layouts that have a name, and the search for their files in a directory.

A layout is data. A new kind of file is one more Layout (`add_format`), or keys of a task's `data` (source.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from minbert_fast.data.labels import Label, Numbers, Rule
from minbert_fast.data.messages import DataError, show, show_path

Kind = Literal["auto", "csv", "tsv", "jsonl", "parquet", "text"]
Quoting = Literal["course", "csv", "none"]


@dataclass(frozen=True)
class Layout:
    """How a file is read: its format, its columns and its labels. Empty values are found in the file."""

    name: str
    texts: tuple[str, ...] = ()  # one column per text of an example
    label: tuple[str, ...] = ()  # a column, or several columns of 0 and 1
    id: str = ""  # column of the row's name; empty: the line number
    format: Kind = "auto"  # auto: by the file's ending
    separator: str = ""  # of csv and tsv; empty: as in the header line
    quoting: Quoting = "csv"  # course: a quoted field has separators or line breaks, not both; none: quotes are text
    columns: tuple[str, ...] = ()  # the columns of a csv or tsv file without a header line
    rule: Rule | None = None  # how labels become numbers, unless the task says otherwise
    classes: tuple[str, ...] = ()  # names of the classes in order; labels may be their numbers
    values: Mapping[str, float | str] = field(default_factory=dict, hash=False)  # replaces labels
    skip: tuple[str, ...] = ()  # rows with these labels are left out and counted
    stem: str = ""  # in a data directory the files are called {stem}-{split}.csv (.jsonl); empty: not looked for there

    @property
    def arity(self) -> int:
        """Texts per example; 0 if the file decides."""
        return len(self.texts)

    def names(self, split: str) -> tuple[str, ...]:
        """File names of a split in order of preference; the course calls its unlabelled tests `test-student`."""
        if not self.stem:
            return ()
        if self.format == "jsonl":
            return (f"{self.stem}-{split}.jsonl",)
        names = (f"{self.stem}-{split}.csv",)
        return (*names, f"{self.stem}-test-student.csv") if split == "test" else names


def _course(name: str, stem: str, texts: tuple[str, ...], label: Label) -> Layout:
    """The layout of a file of the course: a header line, columns found by name, the course's strict quoting."""
    return Layout(name, texts, (label.column,), "id", "tsv", "\t", "course", rule=label, stem=stem)


_PAIR = ("sentence1", "sentence2")
_COURSE = (
    _course("sentiment", "ids-sst", ("sentence",), Label("sentiment", 0, 4, True, "int64")),
    _course("paraphrase", "quora", _PAIR, Label("is_duplicate", 0, 1, True, "float32")),
    _course("similarity", "sts", _PAIR, Label("similarity", 0, 5, False, "float32")),
    _course("polarity", "ids-cfimdb", ("sentence",), Label("sentiment", 0, 1, True, "int64")),
    Layout("triplets", ("sent0", "sent1", "hard_neg"), format="csv", separator=",", stem="nli-triplets"),
)

_NLI = ("entailment", "neutral", "contradiction")
_ENTAILS = ("entailment", "not_entailment")
_DUPLICATES = ("not_duplicate", "duplicate")


def _glue(task: str, texts: tuple[str, ...], label: str = "label", id: str = "", **keys: Any) -> Layout:
    """A task of GLUE, in the tab-separated files of gluebenchmark.com: quotes are ordinary characters."""
    return Layout(f"glue-{task}", texts, (label,), id, "tsv", "\t", "none", **keys)


_STSB_COLUMNS = ("genre", "file", "year", "id", "score", *_PAIR)
_COLA_COLUMNS = ("source", "label", "mark", "sentence")  # of train and dev; test has a header
_PUBLISHED = (
    # The STS benchmark (Cer et al. 2017): no header; some rows have further columns with the sentences' sources.
    Layout("stsb", _PAIR, ("score",), "", "tsv", "\t", "none", _STSB_COLUMNS, rule=Numbers(0, 5)),
    _glue("sst2", ("sentence",), classes=("negative", "positive")),
    _glue("cola", ("sentence",), classes=("unacceptable", "acceptable"), columns=_COLA_COLUMNS),
    _glue("mrpc", ("#1 String", "#2 String"), "Quality", classes=("not_equivalent", "equivalent")),
    _glue("stsb", _PAIR, "score", "index", rule=Numbers(0, 5)),
    _glue("qqp", ("question1", "question2"), "is_duplicate", "id", classes=_DUPLICATES),
    _glue("mnli", _PAIR, "gold_label", "index", classes=_NLI, skip=("-",)),
    _glue("qnli", ("question", "sentence"), "label", "index", classes=_ENTAILS),
    _glue("rte", _PAIR, "label", "index", classes=_ENTAILS),
    _glue("wnli", _PAIR, "label", "index", classes=_ENTAILS[::-1]),
    # Quora's own quora_duplicate_questions.tsv: a few questions have line breaks, in quotes.
    Layout("quora", ("question1", "question2"), ("is_duplicate",), "id", "tsv", "\t", classes=_DUPLICATES),
    # SNLI (Bowman et al. 2015) and MNLI (Williams et al. 2018). "-": the annotators did not agree.
    Layout("nli", _PAIR, ("gold_label",), format="jsonl", classes=_NLI, skip=("-",)),
    Layout("snli", _PAIR, ("gold_label",), format="jsonl", classes=_NLI, skip=("-",), stem="snli"),
    Layout("multinli", _PAIR, ("gold_label",), format="jsonl", classes=_NLI, skip=("-",), stem="multinli"),
    Layout("label-text", ("text",), ("label",), "", "csv", "|||", "none", ("label", "text")),
    Layout("lines", ("text",), format="text"),  # one sentence a line, without labels
)
_KNOWN = {layout.name: layout for layout in (*_COURSE, *_PUBLISHED)}
FORMATS: Mapping[str, Layout] = MappingProxyType(_KNOWN)
MAIN_TASKS = ("sentiment", "paraphrase", "similarity")


def add_format(layout: Layout) -> None:
    """Registers a layout under its name. Raises ValueError if that name has a different layout."""
    if _KNOWN.setdefault(layout.name, layout) != layout:
        raise ValueError(f"the files of {layout.name!r} have another layout already")


def format_of(layout: str | Layout) -> Layout:
    """The layout of this name. Raises DataError for an unknown name."""
    if isinstance(layout, Layout):
        return layout
    if layout not in FORMATS:
        raise DataError(f"no layout is called {show(layout)}; known are {', '.join(FORMATS)}")
    return FORMATS[layout]


@dataclass(frozen=True)
class Discovery:
    """The files of a split by layout, in the requested order, and notices for the user."""

    paths: dict[str, Path]
    notices: tuple[str, ...]


def find_tables(
    directory: str | os.PathLike[str], split: str = "train", tasks: tuple[str, ...] = MAIN_TASKS
) -> Discovery:
    """Finds the files of the layouts `tasks` in a data directory; one without a file is omitted with a notice.

    Raises DataError if `directory` is not a directory or has no file for any task.
    """
    folder = Path(directory)
    if not os.path.isdir(folder):
        problem = "is not a directory" if os.path.exists(folder) else "does not exist"
        raise DataError(f"{show_path(folder)}: {problem}; expected a directory of data files")
    paths: dict[str, Path] = {}
    notices: list[str] = []
    layouts = list(map(format_of, tasks))
    unplaced, wanted = [x.name for x in layouts if not x.stem], [x for x in layouts if x.stem]
    if unplaced:
        names = ", ".join(unplaced)
        notices.append(f"layout {names}: has no file names of its own; name the files (train = ..., layout = ...)")
    if not wanted:
        raise DataError(notices[0])
    for layout in wanted:
        path = next((folder / name for name in layout.names(split) if os.path.exists(folder / name)), None)
        if path:
            paths[layout.name] = path
        else:
            names = " or ".join(layout.names(split))
            notices.append(f"no {names} in {show_path(folder)}: task {layout.name} is left out")
    if not paths:
        expected = ", ".join(name for layout in wanted for name in layout.names(split))
        raise DataError(f"{show_path(folder)}: no data files; expected one or more of {expected}")
    return Discovery(paths, tuple(notices))
