# SPDX-License-Identifier: Apache-2.0
"""Tokenized sentences: one flat array of word ids, and the offset of each sentence in it; tables of them, and views.

Sentences are stored untruncated as [CLS] .. [SEP]. Batches truncate them, so one tokenized file serves every maximum
length. A view (`TokenTable.select`, chain.py) shares the word ids of the tables that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np

from minbert_fast.data.files import Table
from minbert_fast.data.messages import BadRow, DataError, show_path

#: How the sentences of an example become sequences: one sequence each ("bi"), one joint sequence ("cross"), or both.
Encoder = Literal["bi", "cross", "both"]


Item = TypeVar("Item", covariant=True)
Rows = np.ndarray | Sequence[int]


class Items(Protocol[Item]):
    """A column of a table: an item for each row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Item: ...


class Sentences(Items[np.ndarray], Protocol):
    """A column of tokenized sentences: Tokens, or a view of some."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, int32 [sentences]."""


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n adjacent pieces begins, then the end."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Tokens:
    """Sentences of word ids, concatenated; each is [CLS] .. [SEP]."""

    flat: np.ndarray  # [tokens] word ids, uint16 or int32; may be memory-mapped
    offsets: np.ndarray  # [sentences + 1] int64: where each sentence begins in `flat`, then the end

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sentence: int) -> np.ndarray:
        """The word ids [length] of one sentence (a view)."""
        return self.flat[self.offsets[sentence] : self.offsets[sentence + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[sentence] for sentence in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, int32 [sentences]."""
        lengths = np.empty(len(self), dtype=np.int32)
        # Subtracts into int32 directly: an int64 intermediate of millions of sentences would be twice as large.
        np.subtract(self.offsets[1:], self.offsets[:-1], out=lengths, casting="same_kind")
        return lengths

    @staticmethod
    def of(sentences: Sequence[Sequence[int] | np.ndarray]) -> Tokens:
        parts = [np.empty(0, np.int32), *(np.asarray(sentence, dtype=np.int32) for sentence in sentences)]
        return Tokens(np.concatenate(parts), offsets_of([len(sentence) for sentence in sentences]))


@dataclass(frozen=True)
class Text:
    """Short strings concatenated in UTF-8, so that millions of them need no Python objects."""

    flat: np.ndarray  # [bytes] uint8; may be memory-mapped
    offsets: np.ndarray  # [strings + 1] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return bytes(self.flat[self.offsets[index] : self.offsets[index + 1]]).decode("utf-8")

    @staticmethod
    def of(strings: Sequence[str]) -> Text:
        encoded = [string.encode("utf-8") for string in strings]
        return Text(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets_of([len(each) for each in encoded]))


@dataclass(frozen=True)
class Selected(Generic[Item]):
    """Some items of a column, by row; an item is not copied."""

    base: Items[Item]
    rows: np.ndarray  # [n] int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        return self.base[self.rows[row]]


@dataclass(frozen=True)
class SelectedSentences(Selected[np.ndarray]):
    """Some sentences of a column."""

    base: Sentences

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, int32 [n]."""
        lengths: np.ndarray = self.base.lengths[self.rows]
        return lengths


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
        order = np.argsort(wanted, kind="stable")
        begin = done = 0
        for table in self.reread():
            end = begin + len(table)
            if not np.array_equal(table.lines, self.lines[begin:end]):
                break
            while done < len(order) and wanted[order[done]] < end:
                place = order[done]
                for column, texts in zip(found, table.sentences, strict=True):
                    column[place] = texts[wanted[place] - begin]
                done += 1
            if done == len(order):
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
            sentences = tuple(SelectedSentences(column, kept) for column in sentences)
            labels = None if labels is None else labels[kept]
            ids, lines = Selected(ids, kept), lines[kept]
        return SelectedTable(
            task=self.task,
            path=self.path,
            columns=sentences,
            labels=labels,
            ids=ids,
            lines=lines,
            bad_rows=self.bad_rows,
            source_hash=self.source_hash,
            skipped=self.skipped,
            base=self,
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


@dataclass(frozen=True, kw_only=True)
class SelectedTable(TokenTable):
    """A view of some rows and columns of `base`. The bad rows and the hash are those of the whole table."""

    base: TokenTable
    rows: np.ndarray | None  # [n] int64: row numbers in `base`; None: all
    picked: tuple[int, ...]  # columns of `base`

    def locate(self, row: int) -> str:
        """`file:line` of a row."""
        return self.base.locate(row if self.rows is None else int(self.rows[row]))

    def texts(self, rows: Rows | None = None) -> tuple[list[str], ...]:
        """The texts of some rows, as of `base`."""
        wanted = rows
        if self.rows is not None:
            wanted = self.rows if rows is None else self.rows[np.asarray(rows, dtype=np.int64)]
        found = self.base.texts(wanted)
        return tuple(found[column] for column in self.picked)


def truncate(sentence: np.ndarray, max_length: int) -> np.ndarray:
    """[CLS] .. [SEP] shortened to `max_length` >= 2 tokens; [SEP] is kept."""
    if len(sentence) <= max_length:
        return sentence
    return np.concatenate([sentence[: max_length - 1], sentence[-1:]])


def join_pair(first: np.ndarray, second: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Joins two [CLS] .. [SEP] sentences into [CLS] a [SEP] b [SEP]: word ids [n] and token types int32 [n] (0, then 1).

    A pair above `max_length` >= 3 tokens is shortened like transformers' "longest_first": the longer sentence first, then
    both equally.
    """
    a, b = len(first) - 2, len(second) - 2  # without [CLS] and [SEP]
    budget = max_length - 3
    if a + b > budget:
        half = budget // 2
        if min(a, b) <= half:
            a, b = (a, budget - a) if a <= b else (budget - b, b)
        else:
            a, b = (budget - half, half) if a > b else (half, budget - half)
    parts = (first[: a + 1], first[-1:], second[1 : b + 1], second[-1:])
    types = np.zeros(a + b + 3, dtype=np.int32)
    types[a + 2 :] = 1
    return np.concatenate(parts), types
