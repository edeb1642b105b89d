# SPDX-License-Identifier: Apache-2.0
"""The batch of one training step: packed sentences of all tasks, with labels and row numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert_fast.model.packing import PackedBatch

ALIGNMENT = 16  # bytes: a tensor of a batch's buffer begins at a multiple of it, as kernels' widest accesses need


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
    #: The bytes of all tensors, which are views of it. None: each tensor has its own memory, as after `replace`.
    buffer: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MultitaskBatch:
        """This batch with its tensors on `device`: one copy."""
        if self.packed.tokens.device == torch.device(device):
            return self
        return self._in(self.staged().to(device, non_blocking=non_blocking))

    def clone(self) -> MultitaskBatch:
        """A copy that shares no tensor memory with this batch."""
        return self._in(self.staged().clone())

    def pin_memory(self) -> MultitaskBatch:
        """This batch in page-locked memory. Copies from there to a GPU overlap with the GPU's work."""
        return self._in(self.staged().pin_memory())

    def staged(self) -> Tensor:
        """The bytes of all tensors, one after another: `buffer`, or else copies in a new one."""
        if self.buffer is not None:
            return self.buffer
        tensors = self.tensors()
        size = sum(map(_room, tensors))
        buffer = torch.zeros(size, dtype=torch.uint8, device=self.packed.tokens.device)
        for view, tensor in zip(_views(buffer, tensors), tensors, strict=True):
            view.copy_(tensor)
        return buffer

    def tensors(self) -> list[Tensor]:
        """The tensors of the packed batch, then the labels."""
        return [*self.packed.tensors().values(), *self.labels.values()]

    def _in(self, buffer: Tensor) -> MultitaskBatch:
        """This batch with its tensors as views of `buffer`, which is laid out as `staged` does."""
        views = _views(buffer, self.tensors())
        packed: dict[str, Any] = dict(zip(self.packed.tensors(), views, strict=False))  # leaves the labels
        batch = replace(self, packed=replace(self.packed, **packed), labels=dict(zip(self.labels, views, strict=True)))
        object.__setattr__(batch, "buffer", buffer)
        return batch

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


def _room(tensor: Tensor) -> int:
    """The bytes of a tensor in a buffer, up to where the next one begins."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Views of `buffer`, one after another, with the shapes and dtypes of `tensors`."""
    whole = {dtype: buffer.view(dtype) for dtype in {tensor.dtype for tensor in tensors}}
    begin = 0
    for tensor in tensors:
        piece = whole[tensor.dtype].narrow(0, begin // tensor.element_size(), tensor.numel())
        yield piece if tensor.dim() == 1 else piece.view(tensor.shape)
        begin += _room(tensor)
