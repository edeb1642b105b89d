# SPDX-License-Identifier: Apache-2.0
"""The points of a one-pass step at which other code may act.

A step calls its hooks in this order:

    before_step        host work, before anything runs on the device
    embedding_noise    [N, H] to add to the embeddings
    losses             replace the losses of the labels
    before_weights     the losses of the whole step are known (only if a hook `follows_losses`)
    loss_weights       [T] factors on the losses
    before_backward    the backward is about to write J
    after_layer        the backward has written the gradients of one layer
    after_backward     J, the words' rows, the heads' gradients and the losses are complete
    after_update       the parameters have moved
    remeasured         the losses of the same batch after the update (only if a hook `follows_losses`)

A plain recipe in one process has no hooks. `step/extras` holds the hooks that a recipe can switch on; `parallel` holds the
hook that sums gradients over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.sections import OptimizerOptions
from minbert_fast.step.flat import FlatParameters, TaskGradients
from minbert_fast.step.optim import FlatAdamW

Value = TypeVar("Value")


class StepHook:
    """Does nothing. A hook overrides the methods that it needs. T is the number of tasks, in the order of the batch."""

    part = "optimizer"  # the part of `StepResult.seconds` that the hook's time counts for
    follows_losses = False  # whether the step calls `before_weights` and `remeasured`, which costs a second forward

    def before_step(self, step: int) -> None:
        """Prepares step number `step` (from 0) on the host, outside a captured graph."""

    def embedding_noise(self, batch: MultitaskBatch, bounds: Tensor, seed: Tensor) -> Tensor | None:
        """Returns noise [N, H] for the embeddings, or None. bounds [T + 1] and seed [1] are those of the step."""
        return None

    def losses(self, batch: MultitaskBatch, hidden: Tensor) -> dict[str, Tensor] | None:
        """Returns the loss of each task of the batch from hidden [N, H], or None for the model's own losses."""
        return None

    def before_weights(self, losses: Tensor, present: Sequence[str]) -> None:
        """losses [T] are detached, and this process's share until the exchange, the first hook, sums them in place."""

    def loss_weights(self) -> Tensor | None:
        """Returns factors [T] on the losses, or None."""
        return None

    def before_backward(self) -> None:
        """The backward is about to begin."""

    def after_layer(self, layer: int) -> None:
        """The backward has written the gradients of layer number `layer` and of those above it."""

    def after_backward(self, tensors: Sequence[Tensor]) -> None:
        """J is complete, and so are `tensors`: the words' rows [T, U, H] (if any), the heads' gradients, losses [T]."""

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        """The step is done. losses [T] are unweighted; tasks `present` have examples; skipped [] bool is on the device."""

    def remeasured(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        """losses [T] of the step's batch, with the same dropout, under the updated parameters; as in `before_weights`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the hook's own tensors for a checkpoint, by names that no other part of the step uses."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned and ignores other tensors. Raises ValueError for a missing one."""
        for name, own in self.state_dict().items():
            found = tensors.get(name)
            if found is None or found.shape != own.shape:
                raise ValueError(f"no {name} of shape {list(own.shape)}")
            own.copy_(found)


def first(values: Iterable[Value | None]) -> Value | None:
    """The first value that is not None, where the hooks of a step return values."""
    return next((value for value in values if value is not None), None)


class Exchange(StepHook):
    """The hook of a step that several processes share. It also owns J, and chooses the parameters that a process updates."""

    seed_offset: int  # added to the recipe's seed, so that each process draws its own dropout
    gradients: TaskGradients

    def optimizer(self, options: OptimizerOptions) -> FlatAdamW:
        """Returns the optimizer of the parameters that this process updates."""
        raise NotImplementedError


# Makes the exchange of a step: its flat parameters, rows of J, dtype of J, and the parameters of each encoder layer.
Connect = Callable[[FlatParameters, int, torch.dtype, Sequence[Sequence[nn.Parameter]]], Exchange]
