# SPDX-License-Identifier: Apache-2.0
"""Results of steps (losses, gradient norm, cosines) on the host, fetched from the device for many steps in one copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch

if TYPE_CHECKING:
    from minbert_fast.step.stepping import StepResult


@dataclass(frozen=True)
class Observation:
    """One step's results on the host."""

    step: int
    losses: dict[str, float]  # by task
    grad_norm: float
    cosines: dict[str, float]  # "a|b": cosine between the gradients of tasks a and b
    skipped: tuple[str, ...]  # tasks whose loss or gradient is not finite; the step was skipped if there are any
    rows: Mapping[str, np.ndarray]  # by task: row numbers of the batch's examples
    weights: dict[str, float]  # by task: dynamic weight of the loss; empty without dynamic weights

    @property
    def conflicts(self) -> float | None:
        """Share of task pairs whose gradients have a negative inner product; None without pairs."""
        return sum(c < 0 for c in self.cosines.values()) / len(self.cosines) if self.cosines else None


class Observer:
    """Queues results of steps on the device until `fetch`."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, MultitaskBatch, bool, Tensor]] = []

    def add(self, step: int, batch: MultitaskBatch, result: StepResult) -> None:
        """Queues a step's result without waiting for the device.

        The values are copied: a CUDA graph overwrites its own buffers at the next step.
        """
        weighted = result.task_weights is not None
        parts = [result.losses, result.nonfinite, result.grad_norm, result.task_weights, result.gram]
        packed = torch.cat([part.flatten().float() for part in parts if part is not None])
        self._pending.append((step, batch, weighted, packed))

    def fetch(self) -> list[Observation]:
        """All queued results, in order of their steps. Waits for the device."""
        if not self._pending:
            return []
        rows = torch.stack([packed for *_, packed in self._pending]).tolist()
        found = [_unpack(*pending[:3], row) for pending, row in zip(self._pending, rows, strict=True)]
        self._pending.clear()
        return found


def _unpack(step: int, batch: MultitaskBatch, weighted: bool, values: list[float]) -> Observation:
    tasks, present = batch.tasks, batch.present()
    count = len(tasks)
    losses, flags, (grad_norm, *gram) = values[:count], values[count : 2 * count], values[2 * count :]
    weights, gram = (gram[:count], gram[count:]) if weighted else ([], gram)
    skipped = tuple(task for task, flag in zip(tasks, flags, strict=True) if flag)
    if not skipped and not math.isfinite(grad_norm):  # each task's gradient is finite, their sum overflowed
        skipped = tuple(present)
    cosines = {}
    for i in range(count if gram else 0):
        for j in range(i):
            norms = math.sqrt(max(gram[i * count + i], 0.0) * max(gram[j * count + j], 0.0))
            if math.isfinite(norms) and norms > 0:  # a task without examples has no gradient
                cosines[f"{tasks[j]}|{tasks[i]}"] = gram[i * count + j] / norms
    return Observation(
        step=step,
        losses={task: loss for task, loss in zip(tasks, losses, strict=True) if task in present},
        grad_norm=grad_norm,
        cosines=cosines,
        skipped=skipped,
        rows=batch.rows,
        weights=dict(zip(tasks, weights, strict=False)),
    )
