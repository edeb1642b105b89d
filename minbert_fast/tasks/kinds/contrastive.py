# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings from unlabelled text: the same text under two dropout masks (unsupervised SimCSE, Gao et al. 2021).

Each text must find its second encoding among those of the batch. It needs dropout in the encoder, which is the only
difference between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from minbert_fast.common.schema import check
from minbert_fast.data.tokens import TokenTable
from minbert_fast.ops.cosine import cosine
from minbert_fast.tasks import losses
from minbert_fast.tasks.base import HeadOutput, TaskInput, register
from minbert_fast.tasks.kinds.pretraining import TextOptions, TextTask
from minbert_fast.tasks.kinds.ranking import VectorHead


@dataclass(frozen=True)
class ContrastiveOptions(TextOptions):
    """The paper's setting: temperature 0.05, and an additional layer during training (`project = true`)."""

    temperature: float = 0.05  # divides the cosines; 1: none
    project: bool = False  # a linear layer on each embedding, used only by this task

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.temperature > 0, f"temperature = {self.temperature}: expected above 0 (1: none)")


class ContrastiveHead(VectorHead):
    """The cosines of each text's two encodings, [n]."""

    options: ContrastiveOptions

    def forward(self, inputs: TaskInput) -> HeadOutput:
        vectors = self.vectors(inputs)
        return HeadOutput(cosine(*vectors), vectors)

    def loss(self, output: HeadOutput, labels: Tensor | None) -> Tensor:
        first, second = output.vectors
        return losses.contrastive(first, second, (), self.options.temperature)


@register("contrastive")
class ContrastiveTask(TextTask):
    """`kind = "contrastive"`. A row of its table holds one text twice."""

    Options: ClassVar[type] = ContrastiveOptions
    head_class: ClassVar[type] = ContrastiveHead

    @property
    def compares_examples(self) -> bool:
        return True

    @property
    def arity(self) -> int:
        return 2

    def table(self, tables: Sequence[TokenTable]) -> TokenTable:
        corpus = super().table(tables)
        return replace(corpus, columns=corpus.columns * 2)
