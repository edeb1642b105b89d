# SPDX-License-Identifier: Apache-2.0
"""What the steps computed, fetched from the device only when somebody asks: one copy for all steps since the last."""

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
    """One step as seen from the host. `skipped` names the tasks whose loss or gradient was not finite."""

    step: int
    losses: dict[str, float]
    grad_norm: float
    cosines: dict[str, float]  # "a|b": cosine between the gradients of tasks a and b
    skipped: tuple[str, ...]
    rows: Mapping[str, np.ndarray]  # the batch's examples, by task
    weights: dict[str, float]  # dynamic weights of the losses; empty where there are none

    @property
    def conflicts(self) -> float | None:
        """Share of task pairs whose gradients point apart (negative inner product); None where no pair was seen."""
        return sum(c < 0 for c in self.cosines.values()) / len(self.cosines) if self.cosines else None


class Observer:
    """Collects the results of steps of one stage."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, MultitaskBatch, bool, Tensor]] = []

    def add(self, step: int, batch: MultitaskBatch, result: StepResult) -> None:
        """Notes a step's result with one small copy on the device and no question to it.

        A copy, since the result may lie in a graph's buffers, which the next step overwrites.
        """
        parts = [result.losses, result.nonfinite.float(), result.grad_norm.reshape(1)]
        weighted = result.task_weights is not None
        parts += [each.flatten() for each in (result.task_weights, result.gram) if each is not None]
        self._pending.append((step, batch, weighted, torch.cat([part.float() for part in parts])))

    def fetch(self) -> list[Observation]:
        """Everything noted since the last call, in order."""
        if not self._pending:
            return []
        values = torch.stack([packed for _, _, _, packed in self._pending]).tolist()
        seen = [_observation(s, batch, w, row) for (s, batch, w, _), row in zip(self._pending, values, strict=True)]
        self._pending.clear()
        return seen


def _observation(step: int, batch: MultitaskBatch, weighted: bool, values: list[float]) -> Observation:
    tasks = batch.tasks
    count = len(tasks)
    losses, flags, (grad_norm, *gram) = values[:count], values[count : 2 * count], values[2 * count :]
    weights, gram = (gram[:count], gram[count:]) if weighted else ([], gram)
    skipped = tuple(task for task, flag in zip(tasks, flags, strict=True) if flag)
    if not skipped and not math.isfinite(grad_norm):  # each is finite, their sum is not
        skipped = tuple(batch.active_tasks())
    present = batch.active_tasks()
    cosines = {}
    for i in range(count if gram else 0):
        for j in range(i):
            norms = math.sqrt(max(gram[i * count + i], 0.0) * max(gram[j * count + j], 0.0))
            if math.isfinite(norms) and norms > 0:  # an empty task has no gradient to compare
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
