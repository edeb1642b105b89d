# SPDX-License-Identifier: Apache-2.0
"""Tokenized sentences: one flat array of word ids, and the offset of each sentence in it; views of them.

Sentences are stored untruncated as [CLS] .. [SEP]. Batches truncate them, so one tokenized file serves every maximum
length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item", covariant=True)
HASHED_AT_ONCE = 100_000  # items, to bound memory


class Items(ABC, Generic[Item]):
    """A column of a table: an item for each row."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int, /) -> Item: ...

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """The length of each item, int32 [n]: tokens of a sentence, bytes of a text."""

    @property
    @abstractmethod
    def hashes(self) -> np.ndarray:
        """A hash of each item, uint64 [n]: alike for equal items, almost surely different for others."""


Sentences = Items[np.ndarray]  # a column of tokenized sentences


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n adjacent pieces begins, then the end."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class _Concatenated(Items[Item]):
    """Items as adjacent pieces of one array."""

    flat: np.ndarray  # all items; may be memory-mapped
    offsets: np.ndarray  # [n + 1] int64: where each item begins in `flat`, then the end

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        lengths = np.empty(len(self), dtype=np.int32)
        # Subtracts into int32 directly: an int64 intermediate of millions of sentences would be twice as large.
        np.subtract(self.offsets[1:], self.offsets[:-1], out=lengths, casting="same_kind")
        return lengths

    @property
    def hashes(self) -> np.ndarray:
        """Each element times a random number that belongs to its place in the item, summed."""
        hashes, lengths = np.zeros(len(self), dtype=np.uint64), self.lengths
        factors = np.random.Philox(0).random_raw(int(lengths.max(initial=0)))
        for first in range(0, len(self), HASHED_AT_ONCE):
            some = lengths[first : first + HASHED_AT_ONCE]
            begins = offsets_of(some)
            elements = self.flat[self.offsets[first] :][: begins[-1]].astype(np.uint64) + np.uint64(1)
            elements *= factors[np.arange(begins[-1]) - np.repeat(begins[:-1], some)]
            filled = np.flatnonzero(some)
            if len(filled):
                hashes[first + filled] = np.add.reduceat(elements, begins[filled])
        return hashes


class Tokens(_Concatenated[np.ndarray]):
    """Sentences of word ids, uint16 or int32; each is [CLS] .. [SEP]. An item is a view of `flat`."""

    def __getitem__(self, sentence: int) -> np.ndarray:
        return self.flat[self.offsets[sentence] : self.offsets[sentence + 1]]

    @staticmethod
    def of(sentences: Sequence[Sequence[int] | np.ndarray]) -> Tokens:
        parts = [np.empty(0, np.int32), *(np.asarray(sentence, dtype=np.int32) for sentence in sentences)]
        return Tokens(np.concatenate(parts), offsets_of([len(sentence) for sentence in sentences]))


class Text(_Concatenated[str]):
    """Short strings in UTF-8, uint8, so that millions of them need no Python objects."""

    def __getitem__(self, index: int) -> str:
        return bytes(self.flat[self.offsets[index] : self.offsets[index + 1]]).decode("utf-8")

    @staticmethod
    def of(strings: Sequence[str]) -> Text:
        encoded = [string.encode("utf-8") for string in strings]
        return Text(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets_of([len(each) for each in encoded]))


@dataclass(frozen=True)
class Selected(Items[Item]):
    """Some items of a column, by row; an item is not copied."""

    base: Items[Item]
    rows: np.ndarray  # [n] int64

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        return self.base[self.rows[row]]

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.base.lengths[self.rows])

    @property
    def hashes(self) -> np.ndarray:
        return np.asarray(self.base.hashes[self.rows])


@dataclass(frozen=True)
class Chained(Items[Item]):
    """The items of several columns, one column after the other."""

    parts: tuple[Items[Item], ...]
    begins: list[int]  # [parts + 1]: row where each part begins, then the end

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, row: int) -> Item:
        part = part_of(self.begins, row)
        return self.parts[part][row - self.begins[part]]

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths for part in self.parts])

    @property
    def hashes(self) -> np.ndarray:
        return np.concatenate([part.hashes for part in self.parts])


def part_of(begins: Sequence[int], row: int) -> int:
    """The part that row `row` belongs to. Raises IndexError beyond the last row."""
    if not 0 <= row < begins[-1]:
        raise IndexError(f"row {row} of {begins[-1]}")
    return bisect_right(begins, row) - 1


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
