# SPDX-License-Identifier: Apache-2.0
"""Examples made from text that has no labels: words to guess, and sentences that belong together or do not.

A *maker* turns rows of a table into sequences and the answers that a head is to find in them, anew at each step: a pure
function of (seed, task, step, row), so that training resumes at any step, and several processes that train together make
what one would. The text is that of other tasks' files, laid together by `all_sentences` or `all_pairs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import Text, Tokens, TokenTable, cut, join

IGNORED = -100  # the answer of a place that asks for none, as torch's cross_entropy has it

# ---- What a maker makes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """One task's examples of a step: a sequence each, and what is to be found in it."""

    sequences: list[np.ndarray]  # word ids
    types: list[np.ndarray]  # token types
    answers: list[np.ndarray]  # int64 [k] a sequence, k its own
    places: list[np.ndarray] | None = None  # int64 [k]: the tokens that the answers are for; None: the whole sequence

    def share(self, rank: int, ranks: int) -> Made:
        """Every `ranks`th example from `rank` on."""
        mine = slice(rank, None, ranks)
        places = None if self.places is None else self.places[mine]
        return Made(self.sequences[mine], self.types[mine], self.answers[mine], places)

    @property
    def count(self) -> int:
        """Answers in all."""
        return sum(map(len, self.answers))

    def labels(self, room: int | None = None) -> np.ndarray:
        """All answers [M], or with places [M, 2]: token row, counted from the first sequence's first, and answer.

        Places are padded to `room` with IGNORED answers, so that shapes can be kept to a few sizes.
        """
        answers: np.ndarray = np.concatenate([np.empty(0, np.int64), *self.answers])
        if self.places is None:
            return answers
        begins = np.cumsum([0, *map(len, self.sequences)])
        rows = [place + begin for place, begin in zip(self.places, begins, strict=False)]
        labels = np.zeros((len(answers) if room is None else room, 2), np.int64)
        labels[:, 1] = IGNORED
        labels[: len(answers), 0] = np.concatenate([np.empty(0, np.int64), *rows])
        labels[: len(answers), 1] = answers
        return labels


class Maker(Protocol):
    """Makes a task's examples."""

    def __call__(self, table: TokenTable, rows: np.ndarray, step: int, max_length: int) -> Made:
        """The examples of `rows` at `step`, in sequences of up to `max_length` tokens."""

    def most(self, tokens: int, examples: int) -> int:
        """Answers that so many examples can have in so many tokens, at most."""


# ---- Two makers -----------------------------------------------------------------------------------------------------


class _Stream:
    """Random bits of (seed, name), and in it of (step, row): counters of Philox, whatever was drawn before."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self.key = [seed % (1 << 64), int.from_bytes(digest, "little")]

    def bits(self, step: int, row: int, count: int) -> np.ndarray:
        """uint64 [count]."""
        # The lower half of the counter counts the numbers drawn.
        bits: np.ndarray = np.random.Philox(key=self.key, counter=[0, 0, row, step]).random_raw(count)
        return bits


class Masking:
    """Words to guess (Devlin et al. 2019, section 3.1): of those drawn, 80 % are [MASK], 10 % random, 10 % themselves.

    A sentence of n words has `rate` n of them drawn, rounded up or down by chance so that `rate` is what is drawn on
    average. Special tokens are no words: they are neither drawn nor put in a word's place.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int, task: str) -> None:
        """Raises ValueError for a vocabulary without [MASK]."""
        if tokenizer.mask_id is None:
            raise ValueError(f"task {task} needs a [MASK] in the vocabulary, and there is none")
        special = (tokenizer.unk_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.cls_id, tokenizer.mask_id)
        self.rate = rate
        self.mask_id = tokenizer.mask_id
        self.special = np.array(special)
        self.words = np.setdiff1d(np.arange(tokenizer.vocab_size), self.special)
        self._stream = _Stream(seed, f"masking/{task}")

    def __call__(self, table: TokenTable, rows: np.ndarray, step: int, max_length: int) -> Made:
        (column,) = table.columns
        made = Made([], [], [], [])
        assert made.places is not None
        for row in rows.tolist():
            sentence = cut(column[row], max_length)
            places, put = self._draw(sentence, step, row)
            masked = sentence.astype(np.int32)
            masked[places] = put
            made.sequences.append(masked)
            made.types.append(np.zeros(len(masked), np.int32))
            made.places.append(places)
            made.answers.append(sentence[places].astype(np.int64))
        return made

    def _draw(self, sentence: np.ndarray, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are to be guessed, ascending, and what stands in their place."""
        words = np.flatnonzero(~np.isin(sentence, self.special))
        first, *parts = np.split(self._stream.bits(step, row, 1 + 3 * len(words)), 1 + len(words) * np.arange(3))
        order, fate, other = parts
        count = min(len(words), int(self.rate * len(words) + first.item() / 2**64))
        places = np.sort(words[np.argsort(order, kind="stable")[:count]])
        fate, other = fate[:count] % 10, self.words[other[:count] % len(self.words)]
        return places, np.select([fate < 8, fate == 8], [self.mask_id, other], sentence[places])

    def most(self, tokens: int, examples: int) -> int:
        return int(self.rate * tokens) + examples


class Pairing:
    """Second sentences that follow, or do not (next-sentence prediction, Devlin et al. 2019, section 3.1).

    Every second pair on average keeps its own second sentence (answer 0, as in BERT's own head); the others get that of
    another row (answer 1). Sequences are [CLS] a [SEP] b [SEP].
    """

    def __init__(self, seed: int, task: str) -> None:
        self._stream = _Stream(seed, f"pairing/{task}")

    def __call__(self, table: TokenTable, rows: np.ndarray, step: int, max_length: int) -> Made:
        first, second = table.columns
        made = Made([], [], [])
        for row in rows.tolist():
            coin, draw = self._stream.bits(step, row, 2).tolist()
            other, stranger = row, coin % 2
            if stranger and len(table) > 1:
                other = draw % (len(table) - 1)
                other += other >= row
            sequence, types = join(first[row], second[other], max_length)
            made.sequences.append(sequence)
            made.types.append(types)
            made.answers.append(np.array([int(other != row)]))
        return made

    def most(self, tokens: int, examples: int) -> int:
        return examples


# ---- The text -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus(TokenTable):
    """The text of several tables as one, in memory: a block of rows a part, without labels."""

    parts: tuple[TokenTable, ...] = ()

    def place(self, row: int) -> str:
        """`file:line` of a row."""
        for part in self.parts:
            if row < len(part):
                return part.place(row)
            row -= len(part)
        raise IndexError(f"row {row} beyond the last one")


def all_sentences(name: str, tables: Sequence[TokenTable]) -> Corpus:
    """Every sentence of `tables` as a row of its own: table by table, column by column."""
    blocks = [(table, column) for table in tables for column in table.columns]
    return _corpus(name, [table for table, _ in blocks], [[column] for _, column in blocks])


def all_pairs(name: str, tables: Sequence[TokenTable]) -> Corpus:
    """The first two sentences of every row of `tables`, table by table."""
    return _corpus(name, tables, [table.columns[:2] for table in tables])


def _corpus(name: str, parts: Sequence[TokenTable], blocks: Sequence[Sequence[Tokens]]) -> Corpus:
    lines = np.concatenate([part.lines for part in parts])
    files = {part.path: part.source_hash for part in parts}
    digest = hashlib.blake2b(" ".join(files.values()).encode(), digest_size=16)
    return Corpus(
        task=name,
        path=Path("+".join(path.name for path in files)),
        columns=tuple(_end_to_end(column) for column in zip(*blocks, strict=True)),
        labels=None,
        ids=Text(np.empty(0, np.uint8), np.zeros(len(lines) + 1, np.int64)),
        lines=lines,
        bad_rows=(),
        source_hash=digest.hexdigest(),
        parts=tuple(parts),
    )


def _end_to_end(columns: Sequence[Tokens]) -> Tokens:
    lengths = np.concatenate([column.lengths for column in columns])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Tokens(np.concatenate([column.flat for column in columns]), offsets)
