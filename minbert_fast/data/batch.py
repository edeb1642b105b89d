# SPDX-License-Identifier: Apache-2.0
"""The batch of one training step: packed sentences of every task, with labels and row numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minbert_fast.model.packing import PackedBatch


@dataclass(frozen=True)
class Whole:
    """The step that a batch is one process's share of."""

    examples: dict[str, int]  # of each task, in all processes, twins included
    tokens: int
    answers: dict[str, int] = field(default_factory=dict)  # as the batch's own


@dataclass(frozen=True)
class MultitaskBatch:
    """A packed batch with what each task needs beside its sentences.

    A task's examples have `arity` sentences each, packed as arity blocks: all first sentences, then all second
    sentences, and so on. `labels[name]` is [n] on the batch's device; `rows[name]` are the examples' row numbers in
    their data file's table, so that a bad loss can be traced back to file and line.
    """

    packed: PackedBatch
    tasks: tuple[str, ...]
    arity: dict[str, int]
    labels: dict[str, Tensor]
    rows: dict[str, np.ndarray]
    whole: Whole | None = None  # None: this batch is all of the step
    twins: frozenset[str] = frozenset()  # tasks whose examples are all there twice: once, then all again
    answers: dict[str, int] = field(default_factory=dict)  # what a task's loss is a mean over, if not its examples

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultitaskBatch:
        """The same batch with its tensors on `device`."""
        labels = {name: label.to(device, non_blocking=non_blocking) for name, label in self.labels.items()}
        return replace(self, packed=self.packed.to(device, non_blocking), labels=labels)

    def clone(self) -> MultitaskBatch:
        """A copy whose tensors share no memory with this one's."""
        labels = {name: label.clone() for name, label in self.labels.items()}
        return replace(self, packed=self.packed.clone(), labels=labels)

    def examples(self, name: str) -> int:
        """Number of examples of task `name`."""
        return len(self.rows[name])

    def present(self) -> list[str]:
        """Tasks that have examples in this step, in whatever process."""
        return [name for name in self.tasks if (self.whole.examples[name] if self.whole else self.examples(name))]

    def share(self, name: str) -> float:
        """This batch's part of what the loss of task `name` is a mean over: the weight of its own mean in the step's."""
        if self.whole is None:
            return 1.0
        mine = self.answers.get(name, self.examples(name))
        return mine / max(1, self.whole.answers.get(name, self.whole.examples[name]))

    @property
    def step_tokens(self) -> int:
        """Tokens of the whole step."""
        return self.whole.tokens if self.whole else self.packed.num_tokens
