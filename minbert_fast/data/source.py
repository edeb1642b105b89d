# SPDX-License-Identifier: Apache-2.0
"""Where the examples of a task come from: the `data` of a table `[tasks.<name>]`.

data = "similarity"                                                  a named layout, found in the data directory
data = "reviews.csv"                                                 a training file
data = { train = "news.parquet", dev = "news-dev.jsonl", text = "body", label = "section" }
data = { hub = "owner/name", text = ["premise", "hypothesis"], label = "label", dev = "validation_matched" }
data = [{ train = "snli.jsonl", layout = "nli" }, { train = "mnli.jsonl", layout = "nli" }]      several, one head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from minbert_fast.common.schema import ConfigError, build, check
from minbert_fast.data.formats import FORMATS, Kind

Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """One data set: its files or its name on the hub, and how to read a row.

    An empty key has the value of `layout`, or else one that is found in the file: the columns `text` or `sentence` for one
    text, `sentence1` and `sentence2` for two, `label` for the label.
    """

    train: Names = ""  # file, or files that are read one after the other; with `hub`: the name of a split
    dev: Names = ""
    test: Names = ""
    hub: str = ""  # owner/name of a data set on the Hugging Face hub, or a directory that `datasets` loads
    config: str = ""  # hub: the configuration's name
    layout: str = ""  # a known layout: sets what is not given here
    format: Kind = "auto"  # auto: by the file's ending
    separator: str = ""  # of csv and tsv; empty: by the file's ending
    quoting: Literal["", "csv", "none"] = ""  # none: quotes are ordinary characters
    text: Names = ()  # column(s) of the texts of an example, in order
    label: Names = ""  # column of the label; several columns of 0 and 1 for several classes
    id: str = ""  # column of the row's name; empty: its line number
    columns: Names = ()  # names of all columns of a csv or tsv file without a header line
    values: Mapping[str, float | str] = field(default_factory=dict, hash=False)  # replaces labels: { neutral = 0.5 }
    skip: Names = ()  # labels of rows that are left out and counted, such as "-"

    def __post_init__(self) -> None:
        check(not (self.config and not self.hub), f"config = {self.config!r}: belongs to hub")
        own_format = self.format != "auto" or self.separator or self.quoting or self.columns
        check(not (self.hub and own_format), "hub: the data set has a format")
        one = len(self.separator) <= 1 and self.separator not in ('"', "\r", "\n", "\0")
        check(one or self.separator == "|||", f"separator = {self.separator!r}: expected a character, or '|||'")

    def files(self, split: str) -> tuple[str, ...]:
        """The files (with `hub`: the names of splits) of train, dev or test; none if none is named."""
        return as_tuple(getattr(self, split))

    def with_file(self, split: str, file: Path) -> Source:
        """This source with `file` as its only data of a split."""
        return replace(self, hub="", config="", **{split: str(file)})  # type: ignore[arg-type]

    @property
    def texts(self) -> tuple[str, ...]:
        """The named text columns; none if the layout or the file decides."""
        return as_tuple(self.text)


def as_tuple(names: Names) -> tuple[str, ...]:
    """One name or several as a tuple; an empty name is none."""
    return names if isinstance(names, tuple) else (names,) if names else ()


def sources_of(value: Any, where: str = "data") -> tuple[Source, ...]:
    """The sources that a task's `data` describes. Raises ConfigError naming `where`, the key and what was expected."""
    if isinstance(value, Source):
        return (value,)
    if isinstance(value, str):
        return (Source(layout=value) if value in FORMATS else Source(train=value),) if value else ()
    if isinstance(value, Mapping):
        return (build(Source, value, where, "."),)
    if isinstance(value, list | tuple):
        return tuple(source for i, each in enumerate(value) for source in sources_of(each, f"{where}[{i}]"))
    raise ConfigError(
        f"{where} = {value!r}: expected a file, the name of a layout, a table of keys, or a list of these"
    )
