# SPDX-License-Identifier: Apache-2.0
"""Training examples generated from unlabelled text: masked words, and pairs of sentences that do or do not follow.

An `ExampleGenerator` turns table rows into sequences and targets, different ones at each step. It is a pure function of
(seed, task, step, row): training resumes at any step, and the shards of several processes add up to the batch of one.
The text comes from the files of other tasks, concatenated by `collect_sentences` or `collect_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from minbert_fast.data.sampling import philox
from minbert_fast.data.sentences import join_pair, offsets_of, truncate
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable, chain

IGNORED = -100  # the target of a position without one, as in torch's cross_entropy


@dataclass(frozen=True)
class GeneratedExamples:
    """One task's examples of a step: one sequence per example, and the targets to predict from it."""

    sequences: list[tuple[np.ndarray, np.ndarray | None]]  # word ids, token types (None: all 0)
    targets: list[np.ndarray]  # int64 [k] per sequence; k may differ
    positions: list[np.ndarray] | None = None  # int64 [k]: the tokens that the targets belong to; None: the sequence

    def shard(self, rank: int, ranks: int) -> GeneratedExamples:
        """Every `ranks`th example, starting at `rank`."""
        local = slice(rank, None, ranks)
        positions = None if self.positions is None else self.positions[local]
        return GeneratedExamples(self.sequences[local], self.targets[local], positions)

    @property
    def num_targets(self) -> int:
        """Targets of all examples."""
        return sum(map(len, self.targets))

    def labels(self, capacity: int | None = None) -> np.ndarray:
        """The M targets [M]; with positions [M, 2]: token row (from the task's first token), target.

        Labels with positions are padded to `capacity` rows with IGNORED targets, so that shapes stay within few sizes.
        """
        targets: np.ndarray = np.concatenate([np.empty(0, np.int64), *self.targets])
        if self.positions is None:
            return targets
        begins = offsets_of([len(ids) for ids, _ in self.sequences])
        rows = [position + begin for position, begin in zip(self.positions, begins, strict=False)]
        labels = np.zeros((len(targets) if capacity is None else capacity, 2), np.int64)
        labels[:, 1] = IGNORED
        labels[: len(targets), 0] = np.concatenate([np.empty(0, np.int64), *rows])
        labels[: len(targets), 1] = targets
        return labels


class ExampleGenerator(Protocol):
    """Generates a task's examples."""

    def __call__(self, table: TokenTable, rows: np.ndarray, step: int, max_length: int) -> GeneratedExamples:
        """The examples of `rows` at `step`, in sequences of up to `max_length` tokens."""

    def max_targets(self, tokens: int, examples: int) -> int:
        """The largest number of targets that `examples` sequences of `tokens` tokens in all can have."""


class WordMasking:
    """Masks words to predict (Devlin et al. 2019, section 3.1): 80 % become [MASK], 10 % a random word, 10 % stay.

    A sentence of n words has `rate` * n of them masked, rounded up or down at random so that the mean is exact. Special
    tokens are neither masked nor drawn as random words.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int, task: str) -> None:
        """Raises ValueError for a vocabulary without [MASK]."""
        if tokenizer.mask_id is None:
            raise ValueError(f"task {task} needs a [MASK] in the vocabulary, and there is none")
        self.rate = rate
        self.mask_id = tokenizer.mask_id
        self.special = np.array([tokenizer.unk_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.cls_id, self.mask_id])
        self.words = np.setdiff1d(np.arange(tokenizer.vocab_size), self.special)
        self._stream = (seed, f"masking/{task}")

    def __call__(self, table: TokenTable, rows: np.ndarray, step: int, max_length: int) -> GeneratedExamples:
        (column,) = table.columns
        examples = GeneratedExamples([], [], [])
        assert examples.positions is not None
        for row in rows.tolist():
            sentence = truncate(column[row], max_length)
            positions, replacements = self._draw(sentence, step, row)
            masked = sentence.astype(np.int32)
            masked[positions] = replacements
            examples.sequences.append((masked, None))
            examples.positions.append(positions)
            examples.targets.append(sentence[positions].astype(np.int64))
        return examples

    def _draw(self, sentence: np.ndarray, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The masked positions, ascending, and the word ids that replace them."""
        words = np.flatnonzero(~np.isin(sentence, self.special))
        bits = philox(*self._stream, step, row).random_raw(1 + 3 * len(words))
        first, order, fate, other = np.split(bits, 1 + len(words) * np.arange(3))
        count = min(len(words), int(self.rate * len(words) + first.item() / 2**64))
        positions = np.sort(words[np.argsort(order, kind="stable")[:count]])
        fate, other = fate[:count] % 10, self.words[other[:count] % len(self.words)]
        return positions, np.select([fate < 8, fate == 8], [self.mask_id, other], sentence[positions])

    def max_targets(self, tokens: int, examples: int) -> int:
        return int(self.rate * tokens) + examples


class SentencePairing:
    """Pairs of sentences for next-sentence prediction (Devlin et al. 2019, section 3.1).

    Half of the pairs on average keep their second sentence (target 0, as in BERT's own head); the others get the second
    sentence of another row (target 1). Sequences are [CLS] a [SEP] b [SEP].
    """

    def __init__(self, seed: int, task: str) -> None:
        self._stream = (seed, f"pairing/{task}")

    def __call__(self, table: TokenTable, rows: np.ndarray, step: int, max_length: int) -> GeneratedExamples:
        first, second = table.columns
        examples = GeneratedExamples([], [])
        for row in rows.tolist():
            coin, draw = philox(*self._stream, step, row).random_raw(2).tolist()
            other = row
            if coin % 2 and len(table) > 1:
                other = draw % (len(table) - 1)
                other += other >= row
            examples.sequences.append(join_pair(first[row], second[other], max_length))
            examples.targets.append(np.array([int(other != row)]))
        return examples

    def max_targets(self, tokens: int, examples: int) -> int:
        return examples


def collect_sentences(name: str, tables: Sequence[TokenTable]) -> TokenTable:
    """Every text of `tables` as one row without a label: table by table, column by column."""
    return chain(name, [_unlabelled(table, [column]) for table in tables for column in range(table.arity)])


def collect_pairs(name: str, tables: Sequence[TokenTable]) -> TokenTable:
    """The first two texts of every row of `tables`, table by table, without labels.

    Of a table with one text per row, each row and the row on the next line; a blank line divides documents.
    """
    return chain(name, [_consecutive(table) if table.arity == 1 else _unlabelled(table, [0, 1]) for table in tables])


def _consecutive(table: TokenTable) -> TokenTable:
    """The rows of a table with one column whose next row is on the next line, each with that row as second text."""
    first = np.flatnonzero(np.diff(table.lines) == 1)
    left, right = table.select(first), table.select(first + 1)
    return replace(left, columns=(*left.columns, *right.columns), labels=None)


def _unlabelled(table: TokenTable, columns: list[int]) -> TokenTable:
    return replace(table.select(columns=columns), labels=None)
