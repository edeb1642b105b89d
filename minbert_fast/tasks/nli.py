# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings from natural language inference: a premise, an entailed hypothesis and a contradicting one.

Three objectives on unlabelled triplets: regression of cosines, contrast within the batch, Euclidean triplets. Several may
be trained together with weights. The head has parameters only with `project = true`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from minbert_fast.common.schema import check, check_at_least
from minbert_fast.model.config import BertConfig
from minbert_fast.tasks import losses, metrics
from minbert_fast.tasks.base import Head, HeadOutput, Task, TaskInput, TaskOptions, cosine, register

OBJECTIVES: dict[str, Callable[..., Tensor]] = {  # of options, premises, entailed and contradicting hypotheses
    "regression": lambda options, a, e, c: losses.entailment_regression(a, e, c),
    "contrastive": lambda options, a, e, c: losses.contrastive(a, e, c, options.temperature),
    "triplet": lambda options, a, e, c: losses.triplet(a, e, c, options.margin),
}


@dataclass(frozen=True)
class NliOptions(TaskOptions):
    """`objectives` maps names of OBJECTIVES to weights."""

    data: Literal["triplets"] = "triplets"
    objectives: Mapping[str, float] = field(default_factory=lambda: {"contrastive": 1.0})
    project: bool = False  # a linear layer on each embedding, used only by this task
    temperature: float = 0.05  # of contrastive
    margin: float = 1.0  # of triplet, a Euclidean distance

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.objectives), "objectives: expected at least one")
        for name, weight in self.objectives.items():
            check(name in OBJECTIVES, f"objectives.{name}: expected one of {', '.join(OBJECTIVES)}")
            check(weight >= 0, f"objectives.{name} = {weight}: expected 0 or more")
        check(self.temperature > 0, f"temperature = {self.temperature}: expected above 0")
        check_at_least(self, 0, "margin")
        check(not self.draw.by_class, "balanced, per_class: triplets have no classes")


class NliHead(Head):
    """Cosines of the premise with the entailed and the contradicting hypothesis, scores [n, 2]."""

    options: NliOptions

    def __init__(self, options: NliOptions, config: BertConfig, shared: dict[str, nn.Module]) -> None:
        super().__init__()
        self.options = options
        self.projection = nn.Linear(config.hidden_size, config.hidden_size) if options.project else None

    def forward(self, inputs: TaskInput) -> HeadOutput:
        vectors = inputs.embeddings
        if self.projection is not None:
            vectors = tuple(self.projection(x) for x in vectors)
        anchor, positive, negative = vectors
        return HeadOutput(torch.stack([cosine(anchor, positive), cosine(anchor, negative)], dim=-1), vectors)

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        weights = self.options.objectives
        parts = (weight * OBJECTIVES[name](self.options, *output.vectors) for name, weight in weights.items())
        return sum(parts, output.scores.new_zeros(()))

    def predict(self, output: HeadOutput) -> Tensor:
        entailed, contradicting = output.scores.unbind(-1)
        return (entailed > contradicting).float()


@register("nli")
class NliTask(Task):
    Options: ClassVar[type] = NliOptions
    head_class: ClassVar[type] = NliHead
    labelled: ClassVar[bool] = False
    stem: ClassVar[str] = "nli"
    header: ClassVar[str] = "Follows_Closer_Than_Contradicts"

    def evaluate(self, predictions: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        return {self.primary: metrics.accuracy(predictions, np.ones_like(predictions))}
