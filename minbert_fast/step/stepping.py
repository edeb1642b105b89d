# SPDX-License-Identifier: Apache-2.0
"""The interface, the result and the small parts that the one-pass step and the naive step share."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.hooks import StepHook
from minbert_fast.surgery import Weights


@dataclass(frozen=True)
class StepResult:
    """The measurements of one step, on the device. T tasks, in the order of the batch."""

    losses: Tensor  # [T] mean losses times the tasks' fixed weights, fp32
    grad_norm: Tensor  # [] norm of the combined gradient before clipping
    gram: Tensor | None  # [T, T] inner products of the tasks' encoder gradients; None where they were not kept apart
    nonfinite: Tensor  # [T] bool: tasks whose loss or gradient is not finite; the step was skipped if any
    task_weights: Tensor | None = None  # [T] dynamic weights of the step's losses (`losses` are without them)
    seconds: Mapping[str, float] = field(default_factory=dict)  # by part; empty on a GPU


class PartTimer:
    """Times the parts of a step on a CPU. On a GPU, where the host only queues work, it measures nothing."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._counts = device.type == "cpu"
        self._last = time.perf_counter()

    def end(self, part: str) -> None:
        """Adds the time since the last call to the seconds of `part`."""
        if self._counts:
            now = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
            self._last = now


class TrainingStep(Protocol):
    """A step that the loop can call, save and restore."""

    average: WeightAverage | None  # the averaged weights, which are evaluated and saved; None without `training.ema`

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        """Trains on `batch` with every learning rate times `lr_scale`."""

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """`tensors` by name (moments, generator states) and `scalars` by name (step counts); plain data throughout."""

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for the state of another model."""


def average_of(hooks: Sequence[StepHook]) -> WeightAverage | None:
    """The hook that averages the weights, if there is one."""
    return next((hook for hook in hooks if isinstance(hook, WeightAverage)), None)


SURGERY = "surgery/"  # start of the names of surgery's tensors in a step's state


def state_of(weights: Weights, hooks: Sequence[StepHook]) -> dict[str, Tensor]:
    """The tensors of a step's surgery and hooks for a checkpoint."""
    tensors = {f"{SURGERY}{key}": value for key, value in weights.state_dict().items()}
    for hook in hooks:
        tensors |= hook.state_dict()
    return tensors


def load_state(weights: Weights, hooks: Sequence[StepHook], tensors: Mapping[str, Tensor]) -> None:
    """Restores what `state_of` returned; ignores other tensors. Raises ValueError for a missing one."""
    weights.load_state_dict({k.removeprefix(SURGERY): t for k, t in tensors.items() if k.startswith(SURGERY)})
    for hook in hooks:
        hook.load_state_dict(tensors)
