# SPDX-License-Identifier: Apache-2.0
"""What the one-pass step and the naive one share: interface, result, and where their random numbers start."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from minbert_fast import surgery
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.extras.averaging import WeightAverage


@dataclass(frozen=True)
class StepResult:
    """What a step measured, on the device. T is the number of tasks in the batch's order."""

    losses: Tensor  # [T] weighted mean losses, fp32
    grad_norm: Tensor  # [] norm of the combined gradient before clipping
    gram: Tensor | None  # [T, T] inner products of the tasks' encoder gradients; None where they were not kept apart
    nonfinite: Tensor  # [T] bool: tasks whose loss or gradient is not finite; the step was skipped if any
    task_weights: Tensor | None = None  # [T] dynamic weights of the step's losses (`losses` are without them)
    seconds: Mapping[str, float] = field(default_factory=dict)  # of each part; empty on a device with a time of its own


class Laps:
    """Times the parts of a step on a CPU. On a GPU, where the host only queues work, it measures nothing."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._counts = device.type == "cpu"
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Books the time since the last call under `part`."""
        if self._counts:
            now = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
            self._last = now


class TrainingStep(Protocol):
    """A step that the loop can call, save and restore."""

    @property
    def average(self) -> WeightAverage | None:
        """The averaged weights, where the recipe asks for them: what is evaluated and kept."""

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        """Trains on `batch` with every learning rate times `lr_scale`."""

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """`tensors` by name (moments, generator states) and `scalars` by name (step counts); plain data throughout."""

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores what `state_dict` gave; ValueError where it belongs to another model."""


def step_seed(seed: int, step: int) -> int:
    """The seed of one step's random numbers."""
    return (seed * 1_000_003 + step) % 2**62


def reseed(seed: int, step: int) -> None:
    """Sets torch's generators for one step, so that a resumed run draws what an uninterrupted one would."""
    torch.manual_seed(step_seed(seed, step))


def generator_of(recipe: Recipe) -> torch.Generator:
    """A generator of the recipe's seed."""
    return torch.Generator().manual_seed(recipe.training.seed)


def surgery_of(recipe: Recipe, generator: torch.Generator | None = None) -> surgery.Weights:
    """The recipe's surgery, with random orders from `generator` (default: the recipe's); ConfigError if unknown."""
    try:
        return surgery.weights(recipe.surgery.method, recipe.surgery.reduction, generator or generator_of(recipe))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The surgery's tensors under names of their own in a step's state."""
    return {f"surgery/{key}": value for key, value in state.items()}


def unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `prefixed`; other tensors are passed over."""
    return {key.removeprefix("surgery/"): value for key, value in tensors.items() if key.startswith("surgery/")}
