# SPDX-License-Identifier: Apache-2.0
"""Texts that belong together: an anchor, its positive, and hard negatives, without labels.

`ranking` has an anchor, a positive and any number of negatives, and is judged by retrieval among the dev rows. `triplet` has
exactly one negative, and is judged by how often the positive is nearer. Both offer the same objectives, of which several may
be trained together with weights. The head has parameters only with `project = true`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minbert_fast.common.schema import ConfigError, check, check_at_least
from minbert_fast.data.formats import FORMATS
from minbert_fast.data.sentences import Sentences
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model.config import BertConfig
from minbert_fast.ops.cosine import cosine
from minbert_fast.tasks import losses, metrics
from minbert_fast.tasks.base import Head, HeadOutput, Results, Task, TaskInput, TaskOptions, register

CHUNK = 1_024  # anchors whose candidates are ranked at a time

OBJECTIVES = {  # and what each needs
    "contrastive": "2 texts or more",
    "triplet": "3 texts or more",
    "regression": "3 texts",
}


@dataclass(frozen=True)
class RankingOptions(TaskOptions):
    """Options of `ranking`. `objectives` maps names of OBJECTIVES to weights; triplet and regression need a negative."""

    objectives: Mapping[str, float] = field(default_factory=lambda: {"contrastive": 1.0})  # {loss: weight}
    project: bool = False  # a linear layer on each embedding, used only by this task
    temperature: float = 0.05  # of contrastive, where it divides the cosines; 1: none
    symmetric: bool = False  # contrastive: also choose each positive's anchor among all anchors of the batch
    margin: float = 1.0  # of triplet
    distance: Literal["euclidean", "cosine"] = "euclidean"  # of triplet

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.objectives), "objectives: expected at least one")
        for name, weight in self.objectives.items():
            check(name in OBJECTIVES, f"objectives.{name}: expected one of {', '.join(OBJECTIVES)}")
            check(weight >= 0, f"objectives.{name} = {weight}: expected 0 or more")
        check(self.temperature > 0, f"temperature = {self.temperature}: expected above 0 (1: none)")
        check_at_least(self, 0, "margin")
        check(not self.draw.by_class, "balanced, per_class: rows without labels have no classes")

    def unused(self) -> dict[str, str]:
        readers = {"temperature": "contrastive", "symmetric": "contrastive", "margin": "triplet", "distance": "triplet"}
        idle = {key: f"objectives.{name}" for key, name in readers.items() if name not in self.objectives}
        return super().unused() | idle


@dataclass(frozen=True)
class TripletOptions(RankingOptions):
    """Options of `triplet`."""

    objectives: Mapping[str, float] = field(default_factory=lambda: {"triplet": 1.0})  # {loss: weight}


class VectorHead(Head):
    """A head that compares sentence vectors: the embeddings, with `project` through one linear layer for all of them."""

    def __init__(self, options: Any, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__()
        self.options = options
        self.projection = nn.Linear(config.hidden_size, config.hidden_size) if options.project else None

    def vectors(self, inputs: TaskInput) -> tuple[Tensor, ...]:
        """One tensor [n, H] per sequence of an example."""
        if self.projection is None:
            return inputs.embeddings
        return tuple(self.projection(x) for x in inputs.embeddings)


class RankingHead(VectorHead):
    """Cosines of the anchor with its positive, scores [n], and with each of k negatives, [n, 1 + k]."""

    options: RankingOptions
    compares_rows: ClassVar[bool] = True

    def forward(self, inputs: TaskInput) -> HeadOutput:
        vectors = self.vectors(inputs)
        anchor, *others = vectors
        scores = [cosine(anchor, x) for x in others]
        return HeadOutput(scores[0] if len(scores) == 1 else torch.stack(scores, dim=-1), vectors)

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        parts = (weight * self.objective(name, *output.vectors) for name, weight in self.options.objectives.items())
        return sum(parts, output.scores.new_zeros(()))

    def objective(self, name: str, anchor: Tensor, positive: Tensor, *negatives: Tensor) -> Tensor:
        """The mean loss `name` of OBJECTIVES over the batch; each argument is [n, D]."""
        options = self.options
        if name == "contrastive":
            return losses.contrastive(anchor, positive, negatives, options.temperature, options.symmetric)
        if name == "regression":
            return losses.entailment_regression(anchor, positive, *negatives)
        each = [losses.triplet(anchor, positive, x, options.margin, options.distance) for x in negatives]
        return each[0] if len(each) == 1 else torch.stack(each).mean()

    def predict(self, output: HeadOutput) -> Tensor:
        """With negatives 1 if the positive is nearer than all of them, else 0; without any the cosine."""
        if output.scores.dim() == 1:
            return output.scores
        return (output.scores[:, 0] > output.scores[:, 1:].amax(-1)).float()


@register("ranking")
class RankingTask(Task):
    """`kind = "ranking"`. The number of text columns of its data says how many negatives there are."""

    Options: ClassVar[type] = RankingOptions
    head_class: ClassVar[type] = RankingHead
    labelled: ClassVar[bool] = False
    metric: ClassVar[str] = "ndcg_at_10"
    reported: ClassVar[tuple[str, ...]] = ("recall_at_1", "recall_at_10", "mrr", "ndcg_at_10")
    fewest_texts: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.num_texts
        fits = {"contrastive": True, "triplet": count > 2, "regression": count == 3}
        for name in self.options.objectives:
            where = f"tasks.{self.name}.objectives.{name}"
            check(fits[name], f"{where}: needs {OBJECTIVES[name]}, the data has {count}")

    @property
    def compares_examples(self) -> bool:
        return not {"contrastive", "regression"}.isdisjoint(self.options.objectives)

    @property
    def num_texts(self) -> int:
        counts = {n for source in self.sources if (n := _num_texts(source.texts, source.layout))}
        if len(counts) > 1:
            raise ConfigError(f"tasks.{self.name}.data: one source has {min(counts)} texts, another {max(counts)}")
        found = counts.pop() if counts else self.fewest_texts
        if found < self.fewest_texts:
            raise ConfigError(f"tasks.{self.name}.data: expected {self.fewest_texts} text columns, not {found}")
        return found

    @property
    def known_metrics(self) -> tuple[str, ...]:
        return (*self.reported, "accuracy") if self.num_texts > 2 else self.reported

    def measure(self, results: Results) -> Mapping[str, Callable[[], float]]:
        functions: dict[str, Callable[[], float]] = {"accuracy": lambda: float(np.mean(results.predictions))}
        if results.vectors:
            ranks = retrieval_ranks(results.vectors, results.table)
            functions |= {f"recall_at_{k}": partial(metrics.recall_at, ranks, k) for k in (1, 10)}
            functions |= {"mrr": lambda: metrics.mrr(ranks), "ndcg_at_10": lambda: metrics.ndcg_at(ranks, 10)}
        return functions


@register("triplet")
class TripletTask(RankingTask):
    """`kind = "triplet"`."""

    Options: ClassVar[type] = TripletOptions
    metric: ClassVar[str] = "accuracy"
    reported: ClassVar[tuple[str, ...]] = ("accuracy", *RankingTask.reported)
    fewest_texts: ClassVar[int] = 3

    @property
    def known_metrics(self) -> tuple[str, ...]:
        return self.reported


def retrieval_ranks(vectors: tuple[np.ndarray, ...], table: TokenTable | None = None) -> np.ndarray:
    """The rank of each anchor's positive, from 1, among the positives and negatives of all rows, int64 [n].

    `vectors` are those of anchors, positives and any negatives, [n, D] each; candidates are ranked by cosine. Texts are
    compared through `table`: equal candidates count once, and the positives of an equal anchor in other rows do not count
    against each other. Without a table all texts are different.
    """
    anchors, *others = (F.normalize(torch.from_numpy(x)).numpy() for x in vectors)
    n = len(anchors)
    texts = np.arange(n * len(others)) if table is None else _equal_texts(table.columns[1:])
    anchor_of = np.arange(n) if table is None else _equal_texts(table.columns[:1])
    _, first, candidate = np.unique(texts, return_index=True, return_inverse=True)
    candidates = np.concatenate(others)[first]
    own = candidate[:n]  # the candidate that is each row's positive
    siblings: dict[int, list[int]] = {}
    for text, positive in zip(anchor_of.tolist(), own.tolist(), strict=True):
        siblings.setdefault(text, []).append(positive)
    ranks = np.empty(n, np.int64)
    for begin in range(0, n, CHUNK):
        rows = np.arange(begin, min(n, begin + CHUNK))
        scores = anchors[rows] @ candidates.T
        right = scores[np.arange(len(rows)), own[rows]].copy()
        for i, row in enumerate(rows):
            scores[i, siblings[int(anchor_of[row])]] = -np.inf
        scores[np.arange(len(rows)), own[rows]] = right
        ranks[rows] = metrics.ranks_of(scores, own[rows])
    return ranks


def _equal_texts(columns: tuple[Sentences, ...]) -> np.ndarray:
    """A number for each text of the columns, column by column, equal for equal word ids."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(text.tobytes(), len(known)) for column in columns for text in column])


def _num_texts(columns: tuple[str, ...], layout: str) -> int:
    """Text columns of a data set; 0 if its file decides."""
    return len(columns) or (FORMATS[layout].arity if layout in FORMATS else 0)
