# SPDX-License-Identifier: Apache-2.0
"""The interface, the result and the small parts that the one-pass step and the naive step share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from minbert_fast import surgery
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.hooks import StepHook


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

    @property
    def average(self) -> WeightAverage | None:
        """The averaged weights, which are evaluated and saved; None without `training.ema`."""

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        """Trains on `batch` with every learning rate times `lr_scale`."""

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """`tensors` by name (moments, generator states) and `scalars` by name (step counts); plain data throughout."""

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for the state of another model."""


def average_of(hooks: Iterable[StepHook]) -> WeightAverage | None:
    """The hook that averages the weights, if there is one."""
    return next((hook for hook in hooks if isinstance(hook, WeightAverage)), None)


def surgery_of(recipe: Recipe, generator: torch.Generator) -> surgery.Weights:
    """The recipe's surgery with random task orders from `generator`. Raises ConfigError for an unknown method."""
    try:
        return surgery.weights(recipe.surgery.method, recipe.surgery.reduction, generator)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The surgery's tensors by the names that a step's state gives them."""
    return {f"surgery/{key}": value for key, value in state.items()}


def unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `prefixed`. Ignores other tensors."""
    return {key.removeprefix("surgery/"): value for key, value in tensors.items() if key.startswith("surgery/")}
