# SPDX-License-Identifier: Apache-2.0
"""Dynamic task weights: factors on the tasks' losses that follow the losses themselves.

    method        weight of task t                               changes
    uncertainty   exp(-s_t), with s_t a learned log-variance     every step
    dwa           T softmax over t of (r_t / temperature)        every window of steps

The factors scale the rows of J, with or without surgery. They stay on the device. Several processes compute the same factors
without communication, because each knows the losses of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minbert_fast.recipes.recipe import WeightingOptions
from minbert_fast.step.hooks import StepHook

PREFIX = "weighting/"


class TaskWeights(StepHook):
    """Weights [T] of the tasks' losses, in the order of `tasks`. `state` holds the changing tensors by name."""

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device) -> None:
        self.options = options
        self.tasks = tuple(tasks)
        self.state: dict[str, Tensor] = {}
        self._device = device
        self._masks: dict[frozenset[str], Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.state.items()}

    def _numbers(self, name: str, value: float = 0.0) -> Tensor:
        """Adds a tensor [T] to the state, one number per task."""
        self.state[name] = torch.full((len(self.tasks),), value, device=self._device)
        return self.state[name]

    def _taken(self, present: Sequence[str], skipped: Tensor) -> Tensor:
        """bool [T]: tasks whose loss counts. Made once per set of tasks, so that a captured graph copies nothing."""
        key = frozenset(present)
        if key not in self._masks:
            self._masks[key] = torch.tensor([task in key for task in self.tasks], device=self._device)
        return self._masks[key] & ~skipped


class Uncertainty(TaskWeights):
    """Homoscedastic uncertainty (Kendall, Gal & Cipolla 2018, arXiv:1705.07115, section 3): also minimises over s

        sum over t of  exp(-s_t) L_t + s_t / 2,    s_t = log of the task's variance, 0 at first

    by plain gradient descent on s, whose fixed point is exp(-s_t) L_t = 1/2. The paper's factor 1/2 on a squared error would
    shift s_t by log 2 and change nothing else.
    """

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device) -> None:
        super().__init__(options, tasks, device)
        self.log_variances = self._numbers("log_variances")

    def loss_weights(self) -> Tensor:
        return torch.exp(-self.log_variances)

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        gradient = 0.5 - self.loss_weights() * losses
        self.log_variances -= self.options.lr * torch.where(self._taken(present, skipped), gradient, 0.0)


class DynamicAverage(TaskWeights):
    """Dynamic weight averaging (Liu, Johns & Davison 2019, arXiv:1803.10704, section 3.2): slow tasks weigh more.

    With L_t(n) the mean loss in window n (the paper's epoch), window n has the weights

        T exp(r_t / temperature) / sum over i of exp(r_i / temperature),    r_t = L_t(n - 1) / L_t(n - 2)

    and the first two windows have weights 1. A task without examples in a window keeps its mean. Before a task's first
    example r_t = 1.
    """

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device) -> None:
        super().__init__(options, tasks, device)
        if options.window < 1:
            raise ValueError(f"window = {options.window}: expected the steps of an epoch, or fewer")
        self.current = self._numbers("weights", 1.0)
        self.sums, self.counts = self._numbers("sums"), self._numbers("counts")
        self.last, self.before = self._numbers("last"), self._numbers("before")

    def before_step(self, step: int) -> None:
        windows, into = divmod(step, self.options.window)
        if into or not windows:
            return
        self.before.copy_(self.last)
        self.last.copy_(torch.where(self.counts > 0, self.sums / self.counts, self.last))
        self.sums.zero_()
        self.counts.zero_()
        if windows > 1:
            ratios = torch.where(self.before > 0, self.last / self.before, 1.0)
            self.current.copy_(len(self.tasks) * torch.softmax(ratios / self.options.temperature, 0))

    def loss_weights(self) -> Tensor:
        return self.current

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        taken = self._taken(present, skipped)
        self.sums += torch.where(taken, losses, 0.0)
        self.counts += taken


def task_weights(options: WeightingOptions, tasks: Sequence[str], device: torch.device) -> TaskWeights | None:
    """The hook for the recipe's section `[weighting]`; None for method "none"."""
    if options.method == "none":
        return None
    return {"uncertainty": Uncertainty, "dwa": DynamicAverage}[options.method](options, tasks, device)
