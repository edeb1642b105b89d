# SPDX-License-Identifier: Apache-2.0
"""AdamW with the course's signature and update: for course code, and as one pass over the flat buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.common import huge_pages
from minbert_fast.ops.adamw import LEARNING_RATE, SCALARS, STEP, check_settings
from minbert_fast.recipes.sections import OptimizerOptions
from minbert_fast.step.flat import FlatParameters, UpdateRange


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as the CS224N default project defines it.

    The bias correction is the "efficient" form of Kingma & Ba 2014 (end of section 2: both corrections in the step
    size, epsilon outside them); the decay of Loshchilov & Hutter 2019 comes after the update, with the learning rate
    in it. Parameter groups, `state_dict`, schedulers, closures and `GradScaler` work as with any torch optimizer.

    Raises ValueError for hyperparameters out of range, and RuntimeError for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with settings of their own. Raises ValueError as the constructor, which calls it, does."""
        settings = self.defaults | param_group
        if settings["lr"] < 0.0:
            raise ValueError(f"lr = {settings['lr']}: expected 0 or more")
        check_settings(settings["betas"], settings["eps"], settings["weight_decay"])
        _refuse_other_updates(settings)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of torch's AdamW too, which has no `correct_bias` and counts steps in tensors."""
        for group in state["param_groups"]:
            _refuse_other_updates(group)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for each in self.state.values():
            if "step" in each:
                each["step"] = int(each["step"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise RuntimeError("AdamW takes dense gradients; use SparseAdam for sparse ones")
        for group in self.param_groups:
            for steps, parameters in self._by_step(group["params"]).items():
                self._update(group, steps, parameters)
        return loss

    def _by_step(self, parameters: Iterable[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
        """Parameters with a gradient, by the number of the step they are about to take."""
        groups: dict[int, list[nn.Parameter]] = {}
        for p in parameters:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
            groups.setdefault(state["step"], []).append(p)
        return groups

    def _update(self, group: dict[str, Any], steps: int, parameters: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])  # torch's optimizers take a tensor, too
        values: list[Tensor] = list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        size = lr
        if group["correct_bias"]:
            size = lr * math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(values, first, denominators, -size)
        if group["weight_decay"]:
            torch._foreach_add_(values, values, alpha=-lr * group["weight_decay"])


def _refuse_other_updates(group: Mapping[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):  # of torch's optimizers
        if group.get(name):
            raise ValueError(f"{name} = {group[name]}: this AdamW has no {name}; use torch.optim.AdamW for it")


class FlatAdamW:
    """The same AdamW over `FlatParameters`: J, w, p, m, v -> p, m, v and the product copy, one pass over memory.

    The shared encoder with its words, and each head, has a row of `scalars` on the device:
    learning rate, step count, gradient scale, skip, as in ops/adamw.py, so that a captured graph follows the
    schedule. A step whose gradient is not finite changes nothing, step counts included.

    The optimizer updates the elements of `ranges` and keeps their moments. By default these are all trainable elements.
    """

    def __init__(
        self, flat: FlatParameters, options: OptimizerOptions, ranges: Sequence[UpdateRange] | None = None
    ) -> None:
        self.flat = flat
        self.options = options
        self.ranges = flat.update_ranges() if ranges is None else tuple(ranges)
        device = flat.data.device
        kept = max((owned.kept.stop for owned in self.ranges), default=0)
        self.exp_avg = huge_pages.zeros(kept, device=device)
        self.exp_avg_sq = huge_pages.zeros(kept, device=device)
        self._row_of = {label: row for row, label in enumerate(dict.fromkeys(group.label for group in flat.groups))}
        self.scalars = torch.zeros(len(self._row_of), SCALARS, device=device)
        self._counted: dict[frozenset[str], Tensor] = {}
        slots = 0 if flat.words is None else flat.words.shape[0] + 1
        self._row_slot = torch.empty(slots, dtype=torch.int32, device=device)

    def schedule(self, rate: Tensor) -> None:
        """Sets the learning rate of this step, `rate` [1] on the device; each group's own factor comes on top."""
        self.scalars[:, LEARNING_RATE].copy_(rate)

    def settle(
        self, labels: Sequence[str], values: Tensor, gram: Tensor, w: Tensor, heads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Begins a step of `labels`, unless it is not finite: returns the gradient's norm [], the tasks that are not finite
        [T], and whether the step is skipped []. Arguments as for `ops.settle`."""
        taking = self._counts(frozenset(labels))
        return ops.settle(values, gram, w, heads, self.options.clip, self.scalars, taking)

    def _counts(self, labels: frozenset[str]) -> Tensor:
        """1 in the rows of `labels`, else 0. Made once per set of labels, so that a captured graph copies nothing."""
        if labels not in self._counted:
            taking = [float(label in labels) for label in self._row_of]
            self._counted[labels] = torch.tensor(taking, device=self.scalars.device)
        return self._counted[labels]

    def step_shared(self, J: Tensor, w: Tensor) -> None:
        """Updates the shared region with the combination w [T] of J [T, shared], which is laid out like the moments."""
        for owned in self._ranges_of("shared"):
            self._step(owned, J[:, owned.kept], w)

    def step_head(self, label: str, gradient: Tensor) -> None:
        """Updates the parameters of one head. `gradient` [trainable - words_end] holds the gradients of all heads."""
        for owned in self._ranges_of(label):
            first = owned.begin - self.flat.words_end
            self._step(owned, gradient[None, first : first + owned.end - owned.begin], None)

    def step_words(self, rows: Tensor, ids: Tensor, w: Tensor) -> None:
        """Updates the word embedding from the gradients `rows` [T, U, H] of words `ids` [U] (-1: an unused row).

        Other words have gradient zero. Their moments decay and change the weights all the same, as in dense AdamW.
        """
        slots = self._row_slot
        ops.row_slots(ids, slots)
        flat = self.flat
        assert flat.words is not None
        begin, width = flat.placement(flat.words).begin, flat.words.shape[1]
        for owned in self._ranges_of("words"):  # whole rows
            self._step(owned, rows, w, slots[(owned.begin - begin) // width : (owned.end - begin) // width])

    def _step(self, owned: UpdateRange, J: Tensor, w: Tensor | None, row_slot: Tensor | None = None) -> None:
        flat, group, o, span = self.flat, owned.group, self.options, slice(owned.begin, owned.end)
        buffers = [flat.data[span], self.exp_avg[owned.kept], self.exp_avg_sq[owned.kept], flat.compute[span]]
        if row_slot is not None:
            buffers = [buffer.view(-1, J.shape[2]) for buffer in buffers]
        p, m, v, low = buffers
        copy = None if flat.compute is flat.data else low
        scalars = self.scalars[self._row_of[group.label]]
        settings = (group.lr_factor, *o.betas, o.eps, group.weight_decay, o.correct_bias)
        ops.adamw(ops.AdamWStep(J, w, p, m, v, scalars, copy, row_slot, *settings))

    def _ranges_of(self, label: str) -> list[UpdateRange]:
        return [owned for owned in self.ranges if owned.group.label == label]

    def whole(self, kept: Tensor) -> Tensor:
        """The moments of all trainable elements, from the moments `kept` of this optimizer's ranges."""
        return kept

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Moments by parameter name, and step counts by label. They do not depend on the layout of the buffers."""
        tensors = {}
        for name, buffer in (("exp_avg", self.whole(self.exp_avg)), ("exp_avg_sq", self.whole(self.exp_avg_sq))):
            for spec in self.flat.trainable:
                tensors[f"{spec.name}/{name}"] = self.flat.view(buffer, spec.parameter)
        scalars = {f"{label}/step": float(self.scalars[row, STEP]) for label, row in self._row_of.items()}
        return {"tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores what `state_dict` returned. Raises ValueError for a parameter whose moments are absent or misshapen."""
        for name, buffer in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq)):
            whole = torch.zeros(self.flat.trainable_end)
            for spec in self.flat.trainable:
                found = state["tensors"].get(f"{spec.name}/{name}")
                if found is None or found.shape != spec.parameter.shape:
                    wanted = f"{spec.name} of shape {list(spec.parameter.shape)}"
                    raise ValueError(f"optimizer state: no {name} for {wanted}")
                self.flat.view(whole, spec.parameter).copy_(found)
            for owned in self.ranges:
                buffer[owned.kept].copy_(whole[owned.begin : owned.end])
        for label, row in self._row_of.items():
            self.scalars[row, STEP] = state["scalars"][f"{label}/step"]
