# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings from inference: a premise, a hypothesis that follows from it and one that contradicts it.

Three objectives on triplets without labels: regression of cosines, contrast within the batch, Euclidean triplets. They
may be trained together, each with its weight. The head has no parameters of its own unless it projects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import losses, metrics
from minbert_fast.tasks.base import Head, HeadOutput, Task, TaskInput, TaskOptions, cosine, register, require

Objective = Literal["regression", "contrastive", "triplet"]
OBJECTIVES = ("regression", "contrastive", "triplet")


@dataclass(frozen=True)
class NliOptions(TaskOptions):
    """`objectives` gives each objective's weight."""

    data: Literal["triplets"] = "triplets"
    objectives: Mapping[Objective, float] = field(default_factory=lambda: {"contrastive": 1.0})
    project: bool = False  # a linear layer on each embedding, thrown away after this task
    temperature: float = 0.05  # of contrastive
    margin: float = 1.0  # of triplet, a Euclidean distance

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.objectives), "objectives: expected at least one")
        for name, weight in self.objectives.items():
            require(name in OBJECTIVES, f"objectives.{name}: expected one of {', '.join(OBJECTIVES)}")
            require(weight >= 0, f"objectives.{name} = {weight}: expected 0 or more")
        require(self.temperature > 0, f"temperature = {self.temperature}: expected above 0")
        require(self.margin >= 0, f"margin = {self.margin}: expected 0 or more")
        require(not self.balanced, "balanced: triplets have no classes to balance")


class NliHead(Head):
    """Cosines of the premise with both hypotheses, scores [n, 2]: what follows, what contradicts."""

    options: NliOptions

    def __init__(self, options: NliOptions, hidden_size: int) -> None:
        super().__init__()
        self.options = options
        self.projection = nn.Linear(hidden_size, hidden_size) if options.project else None

    def forward(self, inputs: TaskInput) -> HeadOutput:
        vectors = inputs.embeddings
        if self.projection is not None:
            vectors = tuple(self.projection(x) for x in vectors)
        anchor, positive, negative = vectors
        return HeadOutput(torch.stack([cosine(anchor, positive), cosine(anchor, negative)], dim=-1), vectors)

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        anchor, positive, negative = output.vectors
        total = output.scores.new_zeros(())
        for name, weight in self.options.objectives.items():
            if name == "regression":
                part = losses.entailment_regression(anchor, positive, negative)
            elif name == "contrastive":
                part = losses.contrastive(anchor, positive, negative, self.options.temperature)
            else:
                part = losses.triplet(anchor, positive, negative, self.options.margin)
            total = total + weight * part
        return total

    def predict(self, output: HeadOutput) -> Tensor:
        follows, contradicts = output.scores.unbind(-1)
        return (follows > contradicts).float()


@register("nli")
@dataclass(frozen=True)
class NliTask(Task):
    options: NliOptions

    Options: ClassVar[type] = NliOptions
    labelled: ClassVar[bool] = False
    stem: ClassVar[str] = "nli"
    header: ClassVar[str] = "Follows_Closer_Than_Contradicts"

    @property
    def dataset(self) -> str:
        return self.options.data

    @property
    def arity(self) -> int:
        return 3

    @property
    def primary(self) -> str:
        return f"{self.name}_accuracy"

    def build_head(self, config: BertConfig, shared: dict[str, nn.Module]) -> NliHead:
        return NliHead(self.options, config.hidden_size)

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        return {self.primary: metrics.accuracy(predictions, np.ones_like(predictions))}
