# SPDX-License-Identifier: Apache-2.0
"""Tables of tokenized rows, and views of them: some rows of one table, or several tables as one.

A view shares the word ids of the tables that it is made of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from minbert_fast.data.files import Table
from minbert_fast.data.messages import BadRow, DataError, show_path
from minbert_fast.data.sentences import Chained, Items, Selected, Sentences, offsets_of, part_of

#: How the sentences of an example become sequences: one sequence each ("bi"), one joint sequence ("cross"), or both.
Encoder = Literal["bi", "cross", "both"]

Rows = np.ndarray | Sequence[int]  # row numbers


def sequences_of(encoder: Encoder, texts: int) -> int:
    """Sequences of an example with so many texts."""
    return {"bi": texts, "cross": 1, "both": texts + 1}[encoder]


@dataclass(frozen=True)
class TokenTable:
    """A tokenized data set: n rows of `arity` texts each."""

    task: str  # name of the layout, or of the view
    path: Path  # of the file, or the name of what is no file
    columns: tuple[Sentences, ...]  # n untruncated sentences per column; one column per text of an example
    labels: np.ndarray | None  # [n] or [n, C], int64 classes or float32 values; None for an unlabelled table
    ids: Items[str]  # [n]
    lines: np.ndarray  # [n] int64: the line where each row begins in its file
    bad_rows: tuple[BadRow, ...]
    source_hash: str  # of the content; empty for rows that were not loaded by `load_tokens`
    skipped: int = 0  # rows left out because of their label
    reread: Callable[[], Iterator[Table]] | None = field(default=None, compare=False)  # reads the texts again

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def arity(self) -> int:
        """Texts per example."""
        return len(self.columns)

    def locate(self, row: int) -> str:
        """`file:line` of a row."""
        return f"{show_path(self.path)}:{self.lines[row]}"

    def texts(self, rows: Rows | None = None) -> tuple[list[str], ...]:
        """The texts of some rows (None: all), one list per text of an example; files are read again for them.

        Raises DataError if the file has changed, ValueError for a table that does not know where its texts are.
        """
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        found: tuple[list[str], ...] = tuple([""] * len(wanted) for _ in self.columns)
        if len(wanted) == 0:
            return found
        if self.reread is None:
            raise ValueError(f"{show_path(self.path)}: the texts of this table were not kept")
        begin, missing = 0, len(wanted)
        for table in self.reread():
            end = begin + len(table)
            if not np.array_equal(table.lines, self.lines[begin:end]):
                break
            places = np.flatnonzero((begin <= wanted) & (wanted < end))
            for column, texts in zip(found, table.sentences, strict=True):
                for place in places:
                    column[place] = texts[wanted[place] - begin]
            missing -= len(places)
            if not missing:
                return found
            begin = end
        raise DataError(f"{show_path(self.path)}: changed since it was tokenized")

    def select(self, rows: Rows | None = None, columns: Sequence[int] | None = None) -> TokenTable:
        """A view of some rows, by their numbers (None: all), and of some texts of each. The word ids are not copied."""
        picked = tuple(range(self.arity)) if columns is None else tuple(columns)
        sentences = tuple(self.columns[column] for column in picked)
        labels, ids, lines, kept = self.labels, self.ids, self.lines, None
        if rows is not None:
            kept = np.asarray(rows, dtype=np.int64)
            sentences = tuple(Selected(column, kept) for column in sentences)
            labels = None if labels is None else labels[kept]
            ids, lines = Selected(ids, kept), lines[kept]
        return TableView(
            task=self.task,
            path=self.path,
            columns=sentences,
            labels=labels,
            ids=ids,
            lines=lines,
            bad_rows=self.bad_rows,
            source_hash=self.source_hash,
            skipped=self.skipped,
            parts=(self,),
            begins=[0, len(self)],
            rows=kept,
            picked=picked,
        )

    def lengths(self, encoder: Encoder = "bi") -> np.ndarray:
        """Tokens of each sequence of each row before truncation, int32 [n, sequences]."""
        separate = [column.lengths for column in self.columns]
        joint = [] if encoder == "bi" else [sum(separate, 1 - self.arity)]
        return np.stack([*([] if encoder == "cross" else separate), *joint], axis=1)

    def count_truncated(self, max_length: int, encoder: Encoder = "bi") -> int:
        """The number of rows with a sequence of more than `max_length` tokens."""
        return int((self.lengths(encoder) > max_length).any(axis=1).sum())

    @property
    def hashes(self) -> np.ndarray:
        """A hash of each row's texts, uint64 [n]; compare tables with as many texts a row."""
        hashes = np.zeros(len(self), dtype=np.uint64)
        for place, column in enumerate(self.columns):
            hashes += column.hashes * np.uint64(2 * place + 1)
        return hashes

    def count_repeated(self, other: TokenTable) -> int:
        """The number of rows whose texts are those of a row of `other`, with as many texts a row."""
        return int(np.isin(self.hashes, other.hashes).sum())


@dataclass(frozen=True, kw_only=True)
class TableView(TokenTable):
    """Some rows and texts of `parts`, which are read part after part. Bad rows and hash are those of the whole parts."""

    parts: tuple[TokenTable, ...]
    begins: list[int]  # [parts + 1]: where the rows of each part begin, then the end
    rows: np.ndarray | None  # [n] int64: row numbers, counted through all parts; None: all
    picked: tuple[int, ...]  # columns of the parts

    def locate(self, row: int) -> str:
        row = row if self.rows is None else int(self.rows[row])
        part = part_of(self.begins, row)
        return self.parts[part].locate(row - self.begins[part])

    def texts(self, rows: Rows | None = None) -> tuple[list[str], ...]:
        """The texts of some rows (None: all); only the files of these rows are read again."""
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        if self.rows is not None:
            wanted = self.rows[wanted]
        found: tuple[list[str], ...] = tuple([""] * len(wanted) for _ in self.picked)
        for part, begin, end in zip(self.parts, self.begins, self.begins[1:], strict=False):
            places = np.flatnonzero((begin <= wanted) & (wanted < end))
            texts = part.texts(wanted[places] - begin)
            for column, picked in zip(found, self.picked, strict=True):
                for place, text in zip(places, texts[picked], strict=True):
                    column[place] = text
        return found


def chain(name: str, tables: Sequence[TokenTable]) -> TokenTable:
    """The rows of all tables as one table of the name `name`, table after table.

    Raises ValueError for tables that differ in the number of texts or in the shape of their labels.
    """
    if len({table.arity for table in tables}) != 1:
        raise ValueError(
            f"{name}: data sets with {' and '.join(str(table.arity) for table in tables)} texts an example"
        )
    labels = [table.labels for table in tables if table.labels is not None]
    if labels and (len(labels) < len(tables) or len({(each.dtype, each.shape[1:]) for each in labels}) > 1):
        raise ValueError(f"{name}: data sets with different kinds of labels")
    begins = offsets_of([len(table) for table in tables]).tolist()
    files = {table.path: table for table in tables}  # several tables may have columns of one file
    digest = hashlib.blake2b(" ".join(table.source_hash for table in files.values()).encode(), digest_size=16)
    return TableView(
        task=name,
        path=next(iter(files)) if len(files) == 1 else Path("+".join(path.name for path in files)),
        columns=tuple(Chained(column, begins) for column in zip(*(table.columns for table in tables), strict=True)),
        labels=np.concatenate(labels) if labels else None,
        ids=Chained(tuple(table.ids for table in tables), begins),
        lines=np.concatenate([table.lines for table in tables]),
        bad_rows=tuple(bad for table in files.values() for bad in table.bad_rows),
        source_hash=digest.hexdigest(),
        skipped=sum(table.skipped for table in files.values()),
        parts=tuple(tables),
        begins=begins,
        rows=None,
        picked=tuple(range(tables[0].arity)),
    )
