# SPDX-License-Identifier: Apache-2.0
"""Several tables as one, without copying their word ids."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np

from minbert_fast.data.tokens import Item, Items, Rows, Sentences, TokenTable, offsets_of


@dataclass(frozen=True)
class Chained(Generic[Item]):
    """The items of several columns, one column after the other."""

    parts: tuple[Items[Item], ...]
    begins: list[int]  # [parts + 1]: row where each part begins, then the end

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, row: int) -> Item:
        part = part_of(self.begins, row)
        return self.parts[part][row - self.begins[part]]


@dataclass(frozen=True)
class ChainedSentences(Chained[np.ndarray]):
    """The sentences of several columns."""

    parts: tuple[Sentences, ...]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, int32 [n]."""
        return np.concatenate([part.lengths for part in self.parts])


def part_of(begins: Sequence[int], row: int) -> int:
    """The part that row `row` belongs to. Raises IndexError beyond the last row."""
    if not 0 <= row < begins[-1]:
        raise IndexError(f"row {row} of {begins[-1]}")
    return bisect_right(begins, row) - 1


@dataclass(frozen=True, kw_only=True)
class ChainedTable(TokenTable):
    """The rows of `parts`, part after part."""

    parts: tuple[TokenTable, ...]
    begins: list[int]  # [parts + 1]

    def locate(self, row: int) -> str:
        """`file:line` of a row."""
        part = part_of(self.begins, row)
        return self.parts[part].locate(row - self.begins[part])

    def texts(self, rows: Rows | None = None) -> tuple[list[str], ...]:
        """The texts of some rows; only the files of these rows are read again."""
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        found: tuple[list[str], ...] = tuple([""] * len(wanted) for _ in self.columns)
        for part, begin, end in zip(self.parts, self.begins, self.begins[1:], strict=False):
            places = np.flatnonzero((begin <= wanted) & (wanted < end))
            for column, texts in zip(found, part.texts(wanted[places] - begin), strict=True):
                for place, text in zip(places, texts, strict=True):
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
    files = {table.path: table for table in tables}  # a file may stand in several tables, with other columns
    digest = hashlib.blake2b(" ".join(table.source_hash for table in files.values()).encode(), digest_size=16)
    return ChainedTable(
        task=name,
        path=Path("+".join(path.name for path in files)),
        columns=tuple(
            ChainedSentences(column, begins) for column in zip(*(table.columns for table in tables), strict=True)
        ),
        labels=np.concatenate(labels) if labels else None,
        ids=Chained(tuple(table.ids for table in tables), begins),
        lines=np.concatenate([table.lines for table in tables]),
        bad_rows=tuple(bad for table in files.values() for bad in table.bad_rows),
        source_hash=digest.hexdigest(),
        skipped=sum(table.skipped for table in files.values()),
        parts=tuple(tables),
        begins=begins,
    )
