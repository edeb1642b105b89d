# SPDX-License-Identifier: Apache-2.0
"""The batch of one training step: packed sentences of all tasks, with labels and row numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minbert_fast.model.packing import PackedBatch


@dataclass(frozen=True)
class StepTotals:
    """Sizes of the whole step, summed over all processes."""

    examples: dict[str, int]  # per task, second copies included
    tokens: int
    targets: dict[str, int] = field(default_factory=dict)  # as in MultitaskBatch


@dataclass(frozen=True)
class MultitaskBatch:
    """A packed batch with the labels of each task.

    A task's examples have `arity` sequences each, packed as arity blocks: first all first sequences, then all second
    ones, and so on. `labels[task]` is [n] on the batch's device. `rows[task]` [n] are the examples' row numbers in the
    task's table, so that a loss that is not finite can be reported with file and line.
    """

    packed: PackedBatch
    tasks: tuple[str, ...]
    arity: dict[str, int]
    labels: dict[str, Tensor]
    rows: dict[str, np.ndarray]
    totals: StepTotals | None = None  # None: one process has the whole step
    duplicated: frozenset[str] = frozenset()  # tasks with each example twice: all first copies, then all second ones
    targets: dict[str, int] = field(default_factory=dict)  # number of targets, for tasks whose loss averages over them

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultitaskBatch:
        """This batch with its tensors on `device`."""
        return self._map(self.packed.to(device, non_blocking), lambda t: t.to(device, non_blocking=non_blocking))

    def clone(self) -> MultitaskBatch:
        """A copy that shares no tensor memory with this batch."""
        return self._map(self.packed.clone(), Tensor.clone)

    def pin_memory(self) -> MultitaskBatch:
        """This batch in page-locked memory. Copies from there to a GPU overlap with the GPU's work."""
        return self._map(self.packed.pin_memory(), Tensor.pin_memory)

    def _map(self, packed: PackedBatch, function: Callable[[Tensor], Tensor]) -> MultitaskBatch:
        return replace(self, packed=packed, labels={name: function(label) for name, label in self.labels.items()})

    def num_examples(self, task: str) -> int:
        """Number of examples of a task in this process."""
        return len(self.rows[task])

    def active_tasks(self) -> list[str]:
        """Tasks that have examples in this step, in any process."""
        examples = self.totals.examples if self.totals else {task: self.num_examples(task) for task in self.tasks}
        return [task for task in self.tasks if examples[task]]

    def loss_fraction(self, task: str) -> float:
        """This process's fraction of the examples (or targets) that the step's mean loss of a task averages over."""
        if self.totals is None:
            return 1.0
        local = self.targets.get(task, self.num_examples(task))
        return local / max(1, self.totals.targets.get(task, self.totals.examples[task]))

    @property
    def step_tokens(self) -> int:
        """Tokens of the step in all processes."""
        return self.totals.tokens if self.totals else self.packed.num_tokens
