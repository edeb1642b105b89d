# SPDX-License-Identifier: Apache-2.0
"""Dynamic task weights: factors on the tasks' losses that follow the losses themselves.

    method        weight of task t                               changes
    uncertainty   exp(-s_t), with s_t a learned log-variance     every step
    dwa           T softmax over t of (r_t / temperature)        every window of steps
    famo          softmax over t of (x_t - log L_t), x learned   every step, by a second forward
    random        softmax over t of normal numbers               every step

The factors scale the rows of J, with or without surgery. They stay on the device: no method needs the host. Several
processes compute the same factors, because each knows the losses of the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minbert_fast.recipes.sections import WeightingOptions
from minbert_fast.step.hooks import StepHook
from minbert_fast.step.numbers import seed_of

PREFIX = "weighting/"


class TaskWeights(StepHook):
    """Weights [T] of the tasks' losses, in the order of `tasks`. `state` holds the changing tensors by name."""

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device, seed: int = 0) -> None:
        self.options = options
        self.tasks = tuple(tasks)
        self.seed = seed
        self.state: dict[str, Tensor] = {}
        self._device = device
        self._masks: dict[frozenset[str], Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.state.items()}

    def numbers(self, name: str, value: float = 0.0) -> Tensor:
        """Adds a tensor [T] to the state, one number per task."""
        self.state[name] = torch.full((len(self.tasks),), value, device=self._device)
        return self.state[name]

    def taken(self, present: Sequence[str], skipped: Tensor) -> Tensor:
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

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device, seed: int = 0) -> None:
        super().__init__(options, tasks, device, seed)
        self.log_variances = self.numbers("log_variances")

    def loss_weights(self) -> Tensor:
        return torch.exp(-self.log_variances)

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        gradient = 0.5 - self.loss_weights() * losses
        self.log_variances -= self.options.lr * torch.where(self.taken(present, skipped), gradient, 0.0)


class DynamicAverage(TaskWeights):
    """Dynamic weight averaging (Liu, Johns & Davison 2019, arXiv:1803.10704, section 3.2): slow tasks weigh more.

    With L_t(n) the mean loss in window n (the paper's epoch), window n has the weights

        T exp(r_t / temperature) / sum over i of exp(r_i / temperature),    r_t = L_t(n - 1) / L_t(n - 2)

    and the first two windows have weights 1. A task without examples in a window keeps its mean. Before a task's first
    example r_t = 1.
    """

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device, seed: int = 0) -> None:
        super().__init__(options, tasks, device, seed)
        if options.window < 1:
            raise ValueError(f"window = {options.window}: expected the steps of an epoch, or fewer")
        self.current = self.numbers("weights", 1.0)
        self.sums, self.counts = self.numbers("sums"), self.numbers("counts")
        self.last, self.before = self.numbers("last"), self.numbers("before")

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
        taken = self.taken(present, skipped)
        self.sums += torch.where(taken, losses, 0.0)
        self.counts += taken


class Famo(TaskWeights):
    """FAMO (Liu, Feng, Stone & Liu 2023, arXiv:2306.03792, algorithm 1): all log losses fall at the same rate.

    With z = softmax(x) of logits x [T], 0 at first, and losses L before and L' after the update on the same batch:

        w_t = z_t / L_t / sum over i of (z_i / L_i),    which is softmax(x - log L)
        d_t = z_t (log(L_t / L'_t) - sum over i of z_i log(L_i / L'_i)),    x <- Adam(x, d + decay x)

    L' takes a second forward, as in the authors' code; losses get 1e-8 added, as in TorchJD. w sums to 1. A task without
    examples, or with a loss that is not finite, is left out: the others move as if there were no such task, and its logit
    and Adam's moments stay.
    """

    follows_losses = True
    EPSILON = 1e-8
    BETAS = (0.9, 0.999)

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device, seed: int = 0) -> None:
        super().__init__(options, tasks, device, seed)
        self.logits = self.numbers("logits")
        self.mean, self.square, self.steps = (self.numbers(name) for name in ("mean", "square", "steps"))
        self._current = torch.full((len(self.tasks),), 1.0 / len(self.tasks), device=device)
        self._logs, self._counted = torch.zeros_like(self._current), torch.zeros_like(self._current, dtype=torch.bool)

    def before_weights(self, losses: Tensor, present: Sequence[str]) -> None:
        self._counted.copy_(self.taken(present, ~losses.isfinite()))
        self._logs.copy_(self._log(losses, self._counted))
        scores = (self.logits - self._logs).masked_fill(~self._counted, -torch.inf)
        self._current.copy_(torch.softmax(scores, 0).nan_to_num(0.0))  # NaN: no task counts

    def loss_weights(self) -> Tensor:
        return self._current

    def remeasured(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        counted = self._counted & losses.isfinite() & ~skipped
        change = torch.where(counted, self._logs - self._log(losses, counted), 0.0)
        z = torch.softmax(self.logits.masked_fill(~counted, -torch.inf), 0).nan_to_num(0.0)  # NaN: no task counts
        gradient = z * (change - (z * change).sum()) + self.options.logit_decay * self.logits
        taken = counted.float()
        self.steps += taken
        for average, value, beta in zip(
            (self.mean, self.square), (gradient, gradient.square()), self.BETAS, strict=True
        ):
            average.lerp_(value, (1 - beta) * taken)
        corrected = [1 - beta ** self.steps.clamp(min=1) for beta in self.BETAS]
        move = self.mean / corrected[0] / ((self.square / corrected[1]).sqrt() + self.EPSILON)
        self.logits -= self.options.logit_lr * taken * move

    def _log(self, losses: Tensor, counted: Tensor) -> Tensor:
        return (torch.where(counted, losses, 1.0).clamp(min=0) + self.EPSILON).log()


class RandomWeights(TaskWeights):
    """Random loss weighting (Lin, Ye, Zhang & Tsang 2022, arXiv:2111.10603, algorithm 2): w = softmax(n), n ~ N(0, I).

    The numbers depend on the recipe's seed and the step alone, so that every process and a resumed run draw the same.
    """

    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device, seed: int = 0) -> None:
        super().__init__(options, tasks, device, seed)
        self._current = torch.full((len(self.tasks),), 1.0 / len(self.tasks), device=device)
        self._generator = torch.Generator()

    def before_step(self, step: int) -> None:
        self._generator.manual_seed(seed_of(self.seed, step))
        drawn = torch.softmax(torch.randn(len(self.tasks), generator=self._generator, dtype=torch.float64), 0).float()
        if self._current.device.type == "cuda":
            drawn = drawn.pin_memory()
        self._current.copy_(drawn, non_blocking=True)

    def loss_weights(self) -> Tensor:
        return self._current


#: The method of a name. A file of your own may add one.
METHODS: dict[str, type[TaskWeights]] = {
    "uncertainty": Uncertainty,
    "dwa": DynamicAverage,
    "famo": Famo,
    "random": RandomWeights,
}


def task_weights(
    options: WeightingOptions, tasks: Sequence[str], device: torch.device, seed: int = 0
) -> TaskWeights | None:
    """The hook for the recipe's section `[weighting]`; None for method "none"."""
    return None if options.method == "none" else METHODS[options.method](options, tasks, device, seed)
