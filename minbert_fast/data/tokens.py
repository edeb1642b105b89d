# SPDX-License-Identifier: Apache-2.0
"""Tokenized sentences: one flat array of word ids and the offsets of the sentences in it.

Sentences are kept whole, as [CLS] .. [SEP]; they are cut to a length where batches are made, so that one
tokenized file serves every length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minbert_fast.data.files import BadRow
from minbert_fast.data.formats import show_path

#: How the sentences of an example become sequences: each for itself, all as one, or each and then all as one.
Encoder = Literal["bi", "cross", "both"]


@dataclass(frozen=True)
class Tokens:
    """Sentences of word ids, each [CLS] .. [SEP], end to end."""

    flat: np.ndarray  # [tokens] word ids, uint16 or int32; may be memory-mapped
    offsets: np.ndarray  # [sentences + 1] int64: where each sentence begins in `flat`, then the end
    truncated: int = 0  # sentences that were cut when this was made

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sentence: int) -> np.ndarray:
        """The word ids [length] of one sentence (a view)."""
        return self.flat[self.offsets[sentence] : self.offsets[sentence + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[sentence] for sentence in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """[sentences] int32: tokens of each sentence."""
        lengths = np.empty(len(self), dtype=np.int32)
        # Straight into 4 bytes each: there may be millions.
        np.subtract(self.offsets[1:], self.offsets[:-1], out=lengths, casting="same_kind")
        return lengths

    @staticmethod
    def of(sentences: Sequence[Sequence[int] | np.ndarray], truncated: int = 0) -> Tokens:
        """Lays sentences of word ids end to end."""
        offsets = np.zeros(len(sentences) + 1, dtype=np.int64)
        np.cumsum([len(sentence) for sentence in sentences], out=offsets[1:])
        flat = np.empty(offsets[-1], dtype=np.int32)
        for begin, sentence in zip(offsets, sentences, strict=False):
            flat[begin : begin + len(sentence)] = sentence
        return Tokens(flat, offsets, truncated)


@dataclass(frozen=True)
class Text:
    """Short strings end to end in UTF-8, so that millions of them need no Python objects."""

    flat: np.ndarray  # [bytes] uint8; may be memory-mapped
    offsets: np.ndarray  # [strings + 1] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return bytes(self.flat[self.offsets[index] : self.offsets[index + 1]]).decode("utf-8")

    @staticmethod
    def of(strings: Sequence[str]) -> Text:
        """Lays strings end to end."""
        encoded = [string.encode("utf-8") for string in strings]
        offsets = np.zeros(len(strings) + 1, dtype=np.int64)
        np.cumsum([len(string) for string in encoded], out=offsets[1:])
        return Text(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)


@dataclass(frozen=True)
class TokenTable:
    """A data file, tokenized: what training and evaluation read. n rows of `arity` sentences each."""

    task: str
    path: Path
    columns: tuple[Tokens, ...]  # one a sentence of the example, n sentences each, uncut
    labels: np.ndarray | None  # [n] int64 classes or float32 values; None where there are none
    ids: Text  # [n]
    lines: np.ndarray  # [n] int64: where each row begins in the file
    bad_rows: tuple[BadRow, ...]
    source_hash: str  # of the file's content; empty for rows that came from no file

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def arity(self) -> int:
        """Sentences of an example."""
        return len(self.columns)

    def place(self, row: int) -> str:
        """`file:line` of a row."""
        return f"{show_path(self.path)}:{self.lines[row]}"

    def lengths(self, encoder: Encoder = "bi") -> np.ndarray:
        """[n, sequences] int32: tokens of each sequence that a row becomes, uncut."""
        apart = [column.lengths for column in self.columns]
        together = [] if encoder == "bi" else [sum(apart, 1 - self.arity)]
        return np.stack([*([] if encoder == "cross" else apart), *together], axis=1)

    def count_truncated(self, max_length: int, encoder: Encoder = "bi") -> int:
        """How many rows lose tokens when sequences are cut to `max_length`."""
        return int((self.lengths(encoder) > max_length).any(axis=1).sum())


def cut(sentence: np.ndarray, max_length: int) -> np.ndarray:
    """[CLS] .. [SEP] cut to `max_length` tokens, [SEP] kept. Raises ValueError below 2 tokens."""
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}, expected at least 2 ([CLS] and [SEP])")
    if len(sentence) <= max_length:
        return sentence
    return np.concatenate([sentence[: max_length - 1], sentence[-1:]])


def join(first: np.ndarray, second: np.ndarray, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Makes [CLS] a [SEP] b [SEP] of two [CLS] .. [SEP]: word ids [n] and types [n] int32 (0, then 1).

    What exceeds `max_length` is taken from the longer sentence until both are equally long, then from both,
    as transformers' "longest_first" does. Raises ValueError below 3 tokens.
    """
    if max_length is not None and max_length < 3:
        raise ValueError(f"max_length is {max_length}, expected at least 3 ([CLS] and two [SEP])")
    a, b = len(first) - 2, len(second) - 2  # without [CLS] and [SEP]
    if max_length is not None and a + b + 3 > max_length:
        budget = max_length - 3
        half = budget // 2
        if min(a, b) <= half:
            a, b = (a, budget - a) if a <= b else (budget - b, b)
        else:
            a, b = (budget - half, half) if a > b else (half, budget - half)
    parts = (first[: a + 1], first[-1:], second[1 : b + 1], second[-1:])
    types = np.zeros(a + b + 3, dtype=np.int32)
    types[a + 2 :] = 1
    return np.concatenate(parts), types
