# SPDX-License-Identifier: Apache-2.0
"""The naive step: padded batches, eager, one backward a task, the classic loop over flat gradients, AdamW a tensor.

The one-pass step is measured against it and checked by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minbert_fast import surgery
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import OptimizerOptions, Recipe
from minbert_fast.step.extras import separate_hooks
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.extras.consistency import Consistency
from minbert_fast.step.stepping import Laps, StepResult, generator_of, prefixed, reseed, surgery_of, unprefixed
from minbert_fast.step.trainable import constant, trainable
from minbert_fast.tasks import MultitaskModel


class AdamW(torch.optim.Optimizer):
    """The course's AdamW, one parameter at a time.

    Kingma & Ba 2014 with the "efficient" bias correction at the end of its section 2 (epsilon outside it), then
    Loshchilov & Hutter 2019's decay, applied after the update with the learning rate in it.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                step_size = group["lr"]
                if group["correct_bias"]:
                    step_size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
                if group["weight_decay"]:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])
        return loss


def pcgrad(gradients: Sequence[Tensor], orders: Sequence[Sequence[int]], reduction: str = "sum") -> Tensor:
    """PCGrad (Yu et al. 2020, algorithm 1) on flat gradients, the classic loop over whole vectors.

    `orders[i]` lists the tasks whose conflicts are taken out of task i's gradient, in turn (i itself is skipped).
    Each projection uses the other tasks' original gradients. Returns the sum or mean of the projected gradients [P].
    """
    projected = [g.clone() for g in gradients]
    for i, g in enumerate(projected):
        for j in orders[i]:
            if j == i:
                continue
            product = torch.dot(g, gradients[j])
            squared = torch.dot(gradients[j], gradients[j])
            if product < 0 and squared > 0:
                g -= product / squared * gradients[j]
    total = torch.stack(projected).sum(0)
    return total / len(projected) if reduction == "mean" else total


def flatten_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The parameters' gradients end to end [P], zero where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def task_gradients(losses: Sequence[Tensor], shared: Sequence[nn.Parameter]) -> list[Tensor]:
    """One backward a task over the whole graph: each task's flat gradient of the `shared` parameters [P].

    Other parameters (heads) are left with the sum of their tasks' gradients in `.grad`.
    """
    gradients = []
    for loss in losses:
        for p in shared:
            p.grad = None
        loss.backward(retain_graph=True)
        gradients.append(flatten_gradients(shared))
    return gradients


def write_gradient(shared: Sequence[nn.Parameter], merged: Tensor) -> None:
    """A flat gradient [P] back into the parameters' `.grad`."""
    offset = 0
    for p in shared:
        p.grad = merged[offset : offset + p.numel()].view_as(p).clone()
        offset += p.numel()


class ReferenceStep:
    """The step of a course project: padded, eager, one backward a task over the whole graph, AdamW a tensor.

    In bf16 it runs under autocast.
    """

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model = model
        self.recipe = recipe
        self.dtype = dtype
        self.generator = generator_of(recipe)
        self.weights = surgery_of(recipe, self.generator)
        parts = trainable(model, recipe)
        self.entries = {e.name: (label, e) for label, e in parts.entries()}
        self.shared = [e.parameter for label, e in self.entries.values() if label in ("shared", "words")]
        self.frozen = [entry.parameter for entry in parts.frozen]
        self.optimizer = AdamW(self._groups(recipe.optimizer), **_adamw_settings(recipe.optimizer))
        self.hooks = separate_hooks(model, recipe, [entry for _, entry in self.entries.values()])
        for p in model.parameters():  # of earlier stages
            p.grad = None
        self.steps = 0

    @property
    def average(self) -> WeightAverage | None:
        return next((hook for hook in self.hooks if isinstance(hook, WeightAverage)), None)

    def _groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for _, entry in self.entries.values():
            groups.setdefault((entry.lr_factor, entry.weight_decay), []).append(entry.parameter)
        return [{"params": p, "lr_factor": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        reseed(self.recipe.training.seed, self.steps)
        for hook in self.hooks:
            hook.before_step(self.steps)
        self.steps += 1
        self.model.train()
        laps = Laps(batch.packed.tokens.device)
        self.optimizer.zero_grad()
        consistency = next((hook.consistency for hook in self.hooks if isinstance(hook, Consistency)), None)
        device = batch.packed.tokens.device.type
        with constant(self.frozen), torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            losses = torch.stack(list(self.model.losses_padded(batch, consistency).values()))
        laps.lap("forward")
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * group["lr_factor"] * lr_scale
        weights = next((w for hook in self.hooks if (w := hook.loss_weights()) is not None), None)
        self._backward(batch, (losses if weights is None else losses * weights).unbind(), laps)
        values = losses.detach()
        parameters = [e.parameter for _, e in self.entries.values() if e.parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.clip or float("inf"))
        nonfinite = ~torch.isfinite(values)
        skip = nonfinite.any() | ~torch.isfinite(norm)
        if not skip:
            self.optimizer.step()
        for hook in self.hooks:
            hook.after_update(values, batch.active_tasks(), skip)
        laps.lap("optimizer")
        return StepResult(values, norm, None, nonfinite, weights, laps.seconds)

    def _backward(self, batch: MultitaskBatch, losses: Sequence[Tensor], laps: Laps) -> None:
        """Leaves the merged gradient in `.grad`; heads of tasks without examples have none."""
        options = self.recipe.surgery
        if options.method == "none" or not self.shared:
            torch.stack(list(losses)).sum().backward()
            laps.lap("backward")
            if options.reduction == "mean":
                for p in self.shared:
                    p.grad = None if p.grad is None else p.grad / len(losses)
        else:
            gradients = task_gradients(losses, self.shared)
            laps.lap("backward")
            if options.method == "pcgrad":
                orders = surgery.task_orders(len(losses), self.generator).tolist()
                merged = pcgrad(gradients, orders, options.reduction)
            else:
                stacked = torch.stack(gradients)
                merged = self.weights(stacked @ stacked.T) @ stacked
            write_gradient(self.shared, merged)
            laps.lap("surgery")
        for label, entry in self.entries.values():
            if label in batch.tasks and not batch.num_examples(label):
                entry.parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        tensors: dict[str, Tensor] = prefixed({"generator": self.generator.get_state()} | self.weights.state_dict())
        scalars: dict[str, Any] = {"steps": self.steps}
        for name, (_, entry) in self.entries.items():
            state = self.optimizer.state.get(entry.parameter)
            if state:
                tensors |= {f"{name}/exp_avg": state["exp_avg"], f"{name}/exp_avg_sq": state["exp_avg_sq"]}
                scalars[f"{name}/step"] = state["step"]
        for hook in self.hooks:
            tensors |= hook.state_dict()
        return {"tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        tensors, scalars = state["tensors"], state["scalars"]
        for name, (_, entry) in self.entries.items():
            if f"{name}/step" in scalars:
                self.optimizer.state[entry.parameter] = {
                    "step": int(scalars[f"{name}/step"]),
                    "exp_avg": tensors[f"{name}/exp_avg"].clone(),
                    "exp_avg_sq": tensors[f"{name}/exp_avg_sq"].clone(),
                }
        for hook in self.hooks:
            hook.load_state_dict(tensors)
        self.generator.set_state(unprefixed(tensors)["generator"])
        self.weights.load_state_dict(unprefixed(tensors))
        self.steps = int(scalars["steps"])


def _adamw_settings(options: OptimizerOptions) -> dict[str, Any]:
    return {"lr": options.lr, "betas": options.betas, "eps": options.eps, "correct_bias": options.correct_bias}
