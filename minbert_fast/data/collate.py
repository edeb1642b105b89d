# SPDX-License-Identifier: Apache-2.0
"""Rows to batches: a step's rows of every task for training, one task's rows by length for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from minbert_fast.data.batch import MultitaskBatch, Whole
from minbert_fast.data.buckets import EXACT, Buckets
from minbert_fast.data.pretraining import Made, Maker
from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokens import Encoder, TokenTable, cut, join
from minbert_fast.model.packing import pack


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows. Tasks stand in the order of `tables`.

    `encoders` says of tasks with pairs what becomes of them: sequences of their own ("bi", the default, arity 2), a single
    sequence [CLS] a [SEP] b [SEP] with token types ("cross", arity 1), or one after the other ("both", arity 3). Tasks in
    `twins` give each example twice: all of a batch's, then all again. Tasks in `makers` have their sequences and labels
    made, as `data/pretraining.py` says (arity 1, no twins).
    Raises ValueError for a task to join that is unknown or has no pairs, and for too small a `max_length`.
    """

    tables: Mapping[str, TokenTable]
    max_length: int  # tokens of a sequence, [CLS] and [SEP] included; longer ones are cut
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    buckets: Buckets = EXACT
    rank: int = 0  # of `ranks` processes that train together: each packs every `ranks`th row of a task
    ranks: int = 1
    twins: frozenset[str] = frozenset()
    makers: Mapping[str, Maker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for task in self._joining:
            if task not in self.tables or self.tables[task].arity != 2:
                raise ValueError(f"task {task!r} has no pairs of sentences to join")
        if self.max_length < (3 if self._joining else 2):
            raise ValueError(f"max_length is {self.max_length}: no room for [CLS] and [SEP]")

    def __call__(self, rows: Mapping[str, np.ndarray], step: int = 0) -> MultitaskBatch:
        """The batch of `rows[task]`, which names every task; a task may have no rows. `step` is for the makers alone.

        All first sequences of a task come before all second ones. Labels are float32 or int64 as in the
        table, or as made; a task without labels has no entry among them.
        """
        made = {
            task: maker(self.tables[task], rows[task], step, self.max_length) for task, maker in self.makers.items()
        }
        sentences: list[list[np.ndarray]] = []
        types: list[list[np.ndarray]] = []
        for task, table in self.tables.items():
            found = (made[task].sequences, made[task].types) if task in made else None
            columns, kinds = found or self._sequences(task, table, rows[task])
            sentences.append(columns)
            types.append(kinds)
        words, whole = None, None
        if self.ranks > 1:  # every process knows the whole step, so nobody has to ask
            every = [sentence for task in sentences for sentence in task]
            words = np.unique(np.concatenate([np.empty(0, dtype=np.int32), *every]))
            copies = {task: 2 if task in self.twins else 1 for task in self.tables}
            tokens = sum(copies[task] * sum(map(len, s)) for task, s in zip(self.tables, sentences, strict=True))
            answers = {task: each.count for task, each in made.items()}
            whole = Whole({task: copies[task] * len(rows[task]) for task in self.tables}, tokens, answers)
            sentences = [self._mine(s, len(rows[task])) for task, s in zip(self.tables, sentences, strict=True)]
            types = [self._mine(k, len(rows[task])) for task, k in zip(self.tables, types, strict=True)]
            rows = {task: drawn[self.rank :: self.ranks] for task, drawn in rows.items()}
            made = {task: each.share(self.rank, self.ranks) for task, each in made.items()}
        if self.twins:
            sentences = [self._twice(task, s, len(rows[task])) for task, s in zip(self.tables, sentences, strict=True)]
            types = [self._twice(task, k, len(rows[task])) for task, k in zip(self.tables, types, strict=True)]
            rows = {task: np.tile(drawn, 2 if task in self.twins else 1) for task, drawn in rows.items()}
        lengths = [len(sentence) for task in sentences for sentence in task]
        packed = pack(
            sentences,
            types if self._joining else None,
            token_capacity=_fit(sum(lengths), self.buckets.tokens),
            sentence_capacity=_fit(len(lengths), self.buckets.sentences),
            max_seqlen=_fit(max(lengths, default=0), self.buckets.seqlen),
            words=words,
        )
        return MultitaskBatch(
            packed=packed,
            tasks=tuple(self.tables),
            arity={task: self._arity(task, table) for task, table in self.tables.items()},
            labels=self._labels(rows, made, packed.tokens.numel()),
            rows={task: np.asarray(rows[task]) for task in self.tables},
            whole=whole,
            twins=self.twins,
            answers={task: each.count for task, each in made.items()},
        )

    @property
    def _joining(self) -> list[str]:
        """Tasks with sequences of two sentences."""
        return [task for task, encoder in self.encoders.items() if encoder != "bi"]

    def _arity(self, task: str, table: TokenTable) -> int:
        """Sequences an example."""
        if task in self.makers:
            return 1
        return {"bi": table.arity, "cross": 1, "both": table.arity + 1}[self.encoders.get(task, "bi")]

    def _labels(self, rows: Mapping[str, np.ndarray], made: Mapping[str, Made], tokens: int) -> dict[str, torch.Tensor]:
        labels = {}
        for task, table in self.tables.items():
            if task in made:
                padded = self.buckets.tokens and len(rows[task])
                room = self.makers[task].most(tokens, len(rows[task])) if padded else None
                labels[task] = torch.from_numpy(made[task].labels(room))
            elif table.labels is not None:
                labels[task] = torch.from_numpy(table.labels[rows[task]])
        return labels

    def _mine(self, sequences: list[np.ndarray], examples: int) -> list[np.ndarray]:
        """This process's share of a task's sequences."""
        return [sequence for column in _columns(sequences, examples) for sequence in column[self.rank :: self.ranks]]

    def _twice(self, task: str, sequences: list[np.ndarray], examples: int) -> list[np.ndarray]:
        """A task's sequences, with all of a column again after it if the task has twins."""
        if task not in self.twins:
            return sequences
        return [sequence for column in _columns(sequences, examples) for sequence in column + column]

    def _sequences(self, task: str, table: TokenTable, rows: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """A task's sequences, and their token types if any task joins pairs."""
        encoder = self.encoders.get(task, "bi")
        sequences, types = [], []
        if encoder != "cross":
            sequences = [cut(column[row], self.max_length) for column in table.columns for row in rows]
            types = [np.zeros(len(s), dtype=np.int32) for s in sequences] if self._joining else []
        if encoder != "bi":
            first, second = table.columns
            joined = [join(first[row], second[row], self.max_length) for row in rows]
            sequences += [ids for ids, _ in joined]
            types += [kinds for _, kinds in joined]
        return sequences, types


def training_batches(
    sampler: Sampler, collator: Collator, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, MultitaskBatch]]:
    """Yields steps (counted over the whole run) and their batches, from `start` to `stop` or without end."""
    step = start
    while stop is None or step < stop:
        yield step, collator(sampler.rows(*sampler.position(step)), step)
        step += 1


def evaluation_batches(
    table: TokenTable,
    *,
    max_length: int,
    task: str | None = None,
    token_budget: int = 16_384,
    encoder: Encoder = "bi",
    buckets: Buckets = EXACT,
) -> Iterator[MultitaskBatch]:
    """Yields each row of a table once, the longest first, in batches of up to `token_budget` tokens.

    The batch has one task, named `task`, else as the table. `batch.rows[task]` says which rows it holds:
    scatter what comes out by them to restore the order.
    """
    task = task or table.task
    collator = Collator({task: table}, max_length, {task: encoder}, buckets)
    tokens = np.minimum(table.lengths(encoder), max_length).sum(axis=1)
    order = np.argsort(-tokens, kind="stable")
    begin = 0
    while begin < len(order):
        # The longest row comes first, so this many rows fit for certain; at least one is taken.
        ahead = np.cumsum(tokens[order[begin : begin + token_budget]])
        end = begin + max(1, int(np.searchsorted(ahead, token_budget, side="right")))
        yield collator({task: order[begin:end]})
        begin = end


def pin(batch: MultitaskBatch) -> MultitaskBatch:
    """The batch in page-locked memory, from which it is copied to a GPU beside the GPU's work."""
    labels = {task: label.pin_memory() for task, label in batch.labels.items()}
    return replace(batch, packed=batch.packed.pin_memory(), labels=labels)


def _columns(sequences: list[np.ndarray], examples: int) -> list[list[np.ndarray]]:
    """A task's sequences, which stand column after column, one list a column."""
    return [sequences[begin : begin + examples] for begin in range(0, len(sequences), max(1, examples))]


def _fit(size: int, buckets: tuple[int, ...]) -> int:
    return next((bucket for bucket in buckets if bucket >= size), size)
