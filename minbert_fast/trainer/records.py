# SPDX-License-Identifier: Apache-2.0
"""Measurements of a run: step results fetched from the device, seconds by part, and the lines of metrics.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.reporting.runs import TRAINING_PARTS
from minbert_fast.step.stepping import StepResult
from minbert_fast.trainer.checkpoint import State
from minbert_fast.trainer.plan import Evaluation, Stage


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


@dataclass(frozen=True)
class _Pending:
    """A step's results on the device, and what the host knows of the step. No batch: it would fill the device's memory."""

    step: int
    tasks: tuple[str, ...]
    present: tuple[str, ...]  # tasks with examples
    rows: Mapping[str, np.ndarray]
    weighted: bool  # whether the losses have dynamic weights
    packed: Tensor  # the results, flattened into one vector


class Observer:
    """Queues results of steps on the device until `fetch`."""

    def __init__(self) -> None:
        self._queue: list[_Pending] = []

    def add(self, step: int, batch: MultitaskBatch, result: StepResult) -> None:
        """Queues a step's result without waiting for the device.

        The values are copied: a CUDA graph overwrites its own buffers at the next step.
        """
        tasks, present = tuple(batch.tasks), tuple(batch.active_tasks())
        parts = [result.losses, result.nonfinite, result.grad_norm, result.task_weights, result.gram]
        packed = torch.cat([part.flatten().float() for part in parts if part is not None])
        self._queue.append(_Pending(step, tasks, present, batch.rows, result.task_weights is not None, packed))

    def fetch(self) -> list[Observation]:
        """All queued results, in order of their steps. Waits for the device."""
        queue, self._queue = self._queue, []
        rows = torch.stack([step.packed for step in queue]).tolist() if queue else []
        return [_unpack(step, values) for step, values in zip(queue, rows, strict=True)]


def _unpack(origin: _Pending, values: list[float]) -> Observation:
    tasks, present = origin.tasks, origin.present
    count = len(tasks)
    losses, flags, (grad_norm, *rest) = values[:count], values[count : 2 * count], values[2 * count :]
    weights, gram = (rest[:count], rest[count:]) if origin.weighted else ([], rest)
    skipped = tuple(task for task, flag in zip(tasks, flags, strict=True) if flag)
    if not skipped and not math.isfinite(grad_norm):  # each task's gradient is finite, their sum overflowed
        skipped = present
    cosines = {}
    for i in range(count if gram else 0):
        for j in range(i):
            norms = math.sqrt(max(gram[i * count + i], 0.0) * max(gram[j * count + j], 0.0))
            if math.isfinite(norms) and norms > 0:  # a task without examples has no gradient
                cosines[f"{tasks[j]}|{tasks[i]}"] = gram[i * count + j] / norms
    return Observation(
        step=origin.step,
        losses={task: loss for task, loss in zip(tasks, losses, strict=True) if task in present},
        grad_norm=grad_norm,
        cosines=cosines,
        skipped=skipped,
        rows=origin.rows,
        weights=dict(zip(tasks, weights, strict=False)),
    )


class Clock:
    """Adds the run's time to `state.timings` by part, and measures the training speed since `reset_speed`."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._last = time.monotonic()
        self.reset_speed()

    def tick(self, name: str, parts: Mapping[str, float] | None = None) -> None:
        """Adds the time since the last tick: the seconds in `parts` to those parts, the rest to part `name`."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self._state.seconds += elapsed
        known = dict(parts or {})
        for part, seconds in {**known, name: max(0.0, elapsed - sum(known.values()))}.items():
            self._state.timings[part] = self._state.timings.get(part, 0.0) + seconds

    def reset_speed(self) -> None:
        """Starts a new interval for `speed`."""
        self._begin = self._counters()

    def speed(self) -> tuple[float, float]:
        """Seconds per step and tokens per second since `reset_speed`, without evaluations and checkpoints."""
        steps, tokens, seconds = (now - then for now, then in zip(self._counters(), self._begin, strict=True))
        return seconds / max(steps, 1), tokens / max(seconds, 1e-9)

    def _counters(self) -> tuple[float, float, float]:
        seconds = sum(self._state.timings.get(part, 0.0) for part in TRAINING_PARTS)
        return self._state.step, self._state.tokens, seconds


def training_record(
    seen: Observation, state: State, stages: Sequence[Stage], clock: Clock, scale: float | None
) -> dict[str, Any]:
    """A step's losses and gradients. `scale` is the learning rate's factor; None for a step before the state's own."""
    record = _position(seen.step, state, stages)
    if scale is not None:
        record["lr"] = stages[state.stage].recipe.optimizer.lr * scale
    record |= {f"loss/{task}": loss for task, loss in seen.losses.items()}
    record |= {"grad_norm": seen.grad_norm, "conflicts": seen.conflicts}
    record |= {f"cosine/{pair}": cosine for pair, cosine in seen.cosines.items()}
    record |= {f"weight/{task}": weight for task, weight in seen.weights.items()}
    if seen.skipped:
        record["skipped"] = list(seen.skipped)
    if scale is not None:
        record |= {"tokens": state.tokens, "skipped_steps": state.skipped_steps}
        record |= {"step_seconds": clock.speed()[0], "time": state.seconds}
    return record


def evaluation_record(evaluation: Evaluation, state: State, stages: Sequence[Stage]) -> dict[str, Any]:
    """The record of the state's own step with the scores added."""
    dev = {f"dev/{name}": value for name, value in evaluation.metrics.items()}
    train = {f"train/{name}": value for name, value in evaluation.train.items()}
    return _position(state.step, state, stages) | (state.record or {}) | dev | train


def _position(step: int, state: State, stages: Sequence[Stage]) -> dict[str, Any]:
    """Step, epoch and stage of a record. `step` may be earlier than the state's own."""
    before = sum(stage.steps / max(stage.steps_per_epoch, 1) for stage in stages[: state.stage])
    epoch = before + (state.stage_step + step - state.step) / max(stages[state.stage].steps_per_epoch, 1)
    return {"step": step, "epoch": round(epoch, 6), "stage": state.stage}
