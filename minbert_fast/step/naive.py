# SPDX-License-Identifier: Apache-2.0
"""The naive step of a course project: padded batches, eager operations, one backward per task, PCGrad's loop over flat
gradients, AdamW on one parameter at a time.

It is the baseline of the one-pass step's timings, and the tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minbert_fast import surgery
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step import optim
from minbert_fast.step.extras import separate_hooks
from minbert_fast.step.extras.consistency import Consistency
from minbert_fast.step.hooks import first
from minbert_fast.step.numbers import seed_generators, seed_of
from minbert_fast.step.stepping import PartTimer, StepResult, average_of, load_state, state_of
from minbert_fast.step.trainable import base_rate, check_trained, constant, trainable
from minbert_fast.tasks import ConsistencyLoss, MultitaskModel


class AdamW(optim.AdamW):
    """The same optimizer with the update of course code: one parameter at a time, one operation at a time."""

    def _update(self, group: dict[str, Any], steps: int, parameters: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        for p in parameters:
            assert p.grad is not None
            m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            step_size = group["lr"]
            if group["correct_bias"]:
                step_size *= math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
            p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
            if group["weight_decay"]:
                p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def pcgrad(gradients: Sequence[Tensor], orders: Sequence[Sequence[int]], reduction: str = "sum") -> Tensor:
    """PCGrad (Yu et al. 2020, algorithm 1) on flat gradients, the classic loop over whole vectors.

    Task i's gradient is projected against the original gradients of the tasks `orders[i]`, in this order; i itself is
    skipped. Returns the sum or mean of the projected gradients [P].
    """
    projected = [g.clone() for g in gradients]
    for i, g in enumerate(projected):
        for j in orders[i]:
            if j == i:
                continue
            product = torch.dot(g, gradients[j])
            if product < 0:  # then gradient j is not zero
                g -= product / torch.dot(gradients[j], gradients[j]) * gradients[j]
    total = torch.stack(projected).sum(0)
    return total / len(projected) if reduction == "mean" else total


def task_gradients(losses: Sequence[Tensor], shared: Sequence[nn.Parameter]) -> list[Tensor]:
    """Each task's gradient [P] of the `shared` parameters, by one backward per task over the whole graph.

    The `.grad` of other parameters (heads) becomes the sum of their tasks' gradients.
    """
    gradients = []
    for loss in losses:
        for p in shared:
            p.grad = None
        loss.backward(retain_graph=True)
        gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in shared]))
    return gradients


def write_gradient(shared: Sequence[nn.Parameter], merged: Tensor) -> None:
    """Sets the parameters' `.grad` from a flat gradient [P]."""
    offset = 0
    for p in shared:
        p.grad = merged[offset : offset + p.numel()].view_as(p)
        offset += p.numel()


class ReferenceStep:
    """The training step of the module's docstring. In bf16 its forward runs under autocast."""

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model = model
        self.recipe = recipe
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(recipe.training.seed)
        self.weights = surgery.weights(recipe.surgery.method, recipe.surgery.reduction, self.generator)
        parts = trainable(model, recipe)
        self.specs = list(parts.trained())
        self.shared = [spec.parameter for label, spec in self.specs if label in ("shared", "words")]
        self.frozen = [spec.parameter for spec in parts.frozen]
        o = recipe.optimizer
        self.optimizer = AdamW(self._groups() or [{"params": []}], o.lr, o.betas, o.eps, correct_bias=o.correct_bias)
        self.hooks = separate_hooks(model, recipe, [spec for _, spec in self.specs])
        self.average = average_of(self.hooks)
        for p in model.parameters():  # an earlier stage may have left gradients
            p.grad = None
        self.steps = 0

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for _, spec in self.specs:
            groups.setdefault((spec.lr_factor, spec.weight_decay), []).append(spec.parameter)
        return [{"params": p, "lr_factor": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        check_trained(self.specs, self.recipe)
        device = batch.packed.tokens.device
        step_seed = seed_of(self.recipe.training.seed, self.steps)
        seed_generators(step_seed, device)
        for hook in self.hooks:
            hook.before_step(self.steps)
        self.steps += 1
        self.model.train()
        timer = PartTimer(device)
        self.optimizer.zero_grad()
        consistency = next((hook.consistency for hook in self.hooks if isinstance(hook, Consistency)), None)
        with constant(self.frozen):
            losses = self._losses(batch, consistency)
        timer.end("forward")
        for group in self.optimizer.param_groups:
            group["lr"] = base_rate(self.recipe.optimizer) * group["lr_factor"] * lr_scale
        follows = any(hook.follows_losses for hook in self.hooks)
        for hook in self.hooks if follows else ():
            hook.before_weights(losses.detach(), batch.active_tasks())
        weights = first(hook.loss_weights() for hook in self.hooks)
        self._backward(batch, (losses if weights is None else losses * weights).unbind(), timer)
        values = losses.detach()
        parameters = [spec.parameter for _, spec in self.specs if spec.parameter.grad is not None]
        clip = self.recipe.optimizer.clip
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip:
            nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        nonfinite = ~torch.isfinite(values)
        skip = nonfinite.any() | ~torch.isfinite(norm)
        if not skip:
            self.optimizer.step()
        for hook in self.hooks:
            hook.after_update(values, batch.active_tasks(), skip)
        timer.end("optimizer")
        if follows:
            seed_generators(step_seed, device)  # the same dropout again
            with torch.no_grad():
                again = self._losses(batch, consistency)
            for hook in self.hooks:
                hook.remeasured(again, batch.active_tasks(), skip)
            timer.end("forward")
        kept = None if weights is None else weights.clone()  # the next step changes them in place
        return StepResult(values, norm, None, nonfinite, kept, timer.seconds)

    def _losses(self, batch: MultitaskBatch, consistency: ConsistencyLoss | None) -> Tensor:
        """The tasks' losses [T]."""
        device = batch.packed.tokens.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return torch.stack(list(self.model.losses_padded(batch, consistency).values()))

    def _backward(self, batch: MultitaskBatch, losses: Sequence[Tensor], timer: PartTimer) -> None:
        """Writes the merged gradient to `.grad`; the heads of tasks without examples get None."""
        options = self.recipe.surgery
        if options.method == "none" or not self.shared:
            torch.stack(list(losses)).sum().backward()
            timer.end("backward")
            for p in self.shared:
                if p.grad is None:  # no task of this step uses it
                    p.grad = torch.zeros_like(p)
                elif options.reduction == "mean":
                    p.grad /= len(losses)
        else:
            gradients = task_gradients(losses, self.shared)
            timer.end("backward")
            if options.method == "pcgrad":
                orders = surgery.task_orders(len(losses), self.generator).tolist()
                merged = pcgrad(gradients, orders, options.reduction)
            else:
                stacked = torch.stack(gradients)
                merged = self.weights(stacked @ stacked.T) @ stacked
            write_gradient(self.shared, merged)
            timer.end("surgery")
        for label, spec in self.specs:
            if label in batch.tasks and not batch.num_examples(label):
                spec.parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        tensors = state_of(self.weights, self.hooks)
        scalars: dict[str, Any] = {"steps": self.steps}
        for _, spec in self.specs:
            state = self.optimizer.state.get(spec.parameter)
            if state:
                tensors |= {f"{spec.name}/exp_avg": state["exp_avg"], f"{spec.name}/exp_avg_sq": state["exp_avg_sq"]}
                scalars[f"{spec.name}/step"] = state["step"]
        return {"tensors": tensors, "scalars": scalars}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        tensors, scalars = state["tensors"], state["scalars"]
        for _, spec in self.specs:
            if f"{spec.name}/step" in scalars:
                moments = {
                    name: tensors[f"{spec.name}/{name}"].to(spec.parameter.device, copy=True)
                    for name in ("exp_avg", "exp_avg_sq")
                }
                self.optimizer.state[spec.parameter] = {"step": int(scalars[f"{spec.name}/step"]), **moments}
        load_state(self.weights, self.hooks, tensors)
        self.steps = int(scalars["steps"])
