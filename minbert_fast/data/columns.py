# SPDX-License-Identifier: Apache-2.0
"""Which columns of a file hold the texts, the label and the id of an example."""

from __future__ import annotations

from dataclasses import dataclass

from minbert_fast.data.formats import Layout
from minbert_fast.data.messages import DataError, show
from minbert_fast.data.readers.records import Records

LABEL = "label"  # the label's column where none is named


@dataclass(frozen=True)
class Columns:
    """The columns that are read, by name."""

    texts: tuple[str, ...]
    label: tuple[str, ...]  # none: labels are not read
    id: str  # empty: the line number is the id

    @property
    def all(self) -> tuple[str, ...]:
        """Id, texts, labels: the order in which a row is read."""
        return ((self.id,) if self.id else ()) + self.texts + self.label


def usual_names(texts: int) -> list[tuple[str, ...]]:
    """The names of text columns that are looked for where none are named, most preferred first."""
    if texts == 1:
        return [("text",), ("sentence",)]
    pairs = [("sentence1", "sentence2"), ("text1", "text2"), ("question1", "question2"), ("premise", "hypothesis")]
    negatives = ["negative"] if texts == 3 else [f"negative_{i}" for i in range(1, texts - 1)]
    ranked = ("anchor", "positive", *negatives)
    return [*pairs, ranked] if texts == 2 else [ranked, tuple(f"text{i}" for i in range(1, texts + 1))]


def choose_columns(records: Records, layout: Layout, texts: int, labeled: bool) -> Columns:
    """The columns to read: those that the layout names, else those of the usual names.

    Raises DataError that names the file's columns if one is missing or there are several of its name.
    """
    found = f"found {show(records.separator.join(map(str, records.names)), 200)}"
    named = layout.texts
    if not named:
        usual = usual_names(texts)
        named = next((names for names in usual if set(names) <= set(records.names)), ())
        if not named:
            expected = ", or ".join(" and ".join(names) for names in usual)
            raise DataError(
                f"{records.place}: no text columns; expected {records.kind} {expected}, or name them (text = ...), {found}"
            )
    columns = Columns(named, (layout.label or (LABEL,)) if labeled else (), layout.id)
    for column in columns.all:
        problem = records.problem(column)
        if problem:
            expected = f"expected {records.kind} {', '.join(columns.all)}"
            parts = column.split(",") if column in columns.label else []
            listed = f"; several label columns are a list in a recipe: label = {parts}" if len(parts) > 1 else ""
            raise DataError(f"{records.place}: {problem} {show(column)}; {expected}, {found}{listed}")
    return columns
