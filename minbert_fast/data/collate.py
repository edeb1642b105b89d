# SPDX-License-Identifier: Apache-2.0
"""Builds batches from table rows: of all tasks for a training step, of one task for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minbert_fast.data.batch import MultitaskBatch, StepTotals
from minbert_fast.data.buckets import EXACT, Buckets
from minbert_fast.data.pretraining import ExampleGenerator, GeneratedExamples
from minbert_fast.data.sentences import join_pair, truncate
from minbert_fast.data.tokens import Encoder, TokenTable
from minbert_fast.model.packing import pack

TokenSequence = tuple[np.ndarray, np.ndarray | None]  # word ids, token types (None: all 0)
Columns = list[list[TokenSequence]]  # a task's sequences; columns[c][i] is sequence c of example i


@dataclass(frozen=True)
class Collator:
    """Builds batches from row numbers. A batch has its tasks in the order of `tables`.

    `encoders` sets the sequences of a pair: one per sentence ("bi", the default, arity 2), one joint sequence
    [CLS] a [SEP] b [SEP] with token types ("cross", arity 1), or the two and then the joint one ("both", arity 3).
    Tasks in `duplicated` get each example twice: first all examples, then all of them again. Tasks in `generators` get
    generated sequences and labels (see pretraining.py; arity 1, not duplicated).
    Raises ValueError for a "cross" or "both" task that is unknown or has no pairs, and if `max_length` is too small.
    """

    tables: Mapping[str, TokenTable]
    max_length: int  # tokens of a sequence, [CLS] and [SEP] included; longer sequences are truncated
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    buckets: Buckets = EXACT
    rank: int = 0  # with several processes, process `rank` packs every `ranks`th example of each task
    ranks: int = 1
    duplicated: frozenset[str] = frozenset()
    generators: Mapping[str, ExampleGenerator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for task in self._joining:
            if task not in self.tables or self.tables[task].arity != 2:
                raise ValueError(f"task {task!r} has no pairs of sentences to join")
        if self.max_length < (3 if self._joining else 2):
            raise ValueError(f"max_length is {self.max_length}: no room for [CLS] and [SEP]")

    def __call__(self, rows: Mapping[str, np.ndarray], step: int = 0) -> MultitaskBatch:
        """The batch of `rows`: row numbers [n] for every task, n may be 0. Only generators use `step`.

        Labels are float32 or int64, as in the table or as generated; a task without labels has no entry.
        """
        generated = {
            task: generate(self.tables[task], rows[task], step, self.max_length)
            for task, generate in self.generators.items()
        }
        columns = {
            task: [generated[task].sequences] if task in generated else self._build_columns(task, rows[task])
            for task in self.tables
        }
        copies = {task: 2 if task in self.duplicated else 1 for task in self.tables}
        words, totals = None, None
        if self.ranks > 1:  # each process builds the whole step, so the totals need no communication
            lengths = {task: sum(len(ids) for c in each for ids, _ in c) for task, each in columns.items()}
            totals = StepTotals(
                examples={task: copies[task] * len(rows[task]) for task in self.tables},
                tokens=sum(copies[task] * lengths[task] for task in self.tables),
                targets={task: each.num_targets for task, each in generated.items()},
            )
            everything = [ids for each in columns.values() for column in each for ids, _ in column]
            words = np.unique(np.concatenate([np.empty(0, dtype=np.int32), *everything]))
            columns = {task: [c[self.rank :: self.ranks] for c in each] for task, each in columns.items()}
            rows = {task: drawn[self.rank :: self.ranks] for task, drawn in rows.items()}
            generated = {task: each.shard(self.rank, self.ranks) for task, each in generated.items()}
        columns = {task: [column * copies[task] for column in each] for task, each in columns.items()}
        rows = {task: np.tile(rows[task], copies[task]) for task in self.tables}
        sequences = [[sequence for column in each for sequence in column] for each in columns.values()]
        sizes = [len(ids) for task in sequences for ids, _ in task]
        packed = pack(
            [[ids for ids, _ in task] for task in sequences],
            [[np.zeros_like(i) if t is None else t for i, t in task] for task in sequences] if self._joining else None,
            token_capacity=_round_up(sum(sizes), self.buckets.tokens),
            sentence_capacity=_round_up(len(sizes), self.buckets.sentences),
            max_seqlen=_round_up(max(sizes, default=0), self.buckets.seqlen),
            words=words,
        )
        return MultitaskBatch(
            packed=packed,
            tasks=tuple(self.tables),
            arity={task: len(each) for task, each in columns.items()},
            labels=self._labels(rows, generated, packed.tokens.numel()),
            rows=rows,
            totals=totals,
            duplicated=self.duplicated,
            targets={task: each.num_targets for task, each in generated.items()},
        )

    @property
    def _joining(self) -> list[str]:
        """Tasks with joint sequences of two sentences."""
        return [task for task, encoder in self.encoders.items() if encoder != "bi"]

    def _build_columns(self, task: str, rows: np.ndarray) -> Columns:
        table, encoder = self.tables[task], self.encoders.get(task, "bi")
        columns: Columns = []
        if encoder != "cross":
            columns = [[(truncate(column[row], self.max_length), None) for row in rows] for column in table.columns]
        if encoder != "bi":
            first, second = table.columns
            columns.append([join_pair(first[row], second[row], self.max_length) for row in rows])
        return columns

    def _labels(
        self, rows: Mapping[str, np.ndarray], generated: Mapping[str, GeneratedExamples], tokens: int
    ) -> dict[str, torch.Tensor]:
        """The labels of each task that has any; generated ones are padded where numbers of sentences are."""
        labels = {}
        for task, table in self.tables.items():
            if task in generated:
                padded = self.buckets.sentences and len(rows[task])
                capacity = self.generators[task].max_targets(tokens, len(rows[task])) if padded else None
                labels[task] = torch.from_numpy(generated[task].labels(capacity))
            elif table.labels is not None:
                labels[task] = torch.from_numpy(table.labels[rows[task]])
        return labels


def evaluation_batches(
    task: str, table: TokenTable, *, max_length: int, token_budget: int, encoder: Encoder
) -> Iterator[MultitaskBatch]:
    """Yields each row of a task's table once, longest first, in batches of up to `token_budget` tokens.

    `batch.rows[task]` are the row numbers of a batch; use them to put results back in the table's order.
    """
    collator = Collator({task: table}, max_length, {task: encoder})
    tokens = np.minimum(table.lengths(encoder), max_length).sum(axis=1)
    for rows in by_length(tokens, token_budget):
        yield collator({task: rows})


def by_length(lengths: np.ndarray, token_budget: int) -> Iterator[np.ndarray]:
    """Batches of row numbers for `lengths` [n], the longest first, each of up to `token_budget` tokens (or a single row)."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order], dtype=np.int64)
    begin = 0
    while begin < len(order):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + token_budget, side="right")))
        yield order[begin:end]
        begin = end


def _round_up(size: int, buckets: Sequence[int]) -> int:
    return next((bucket for bucket in buckets if bucket >= size), size)
