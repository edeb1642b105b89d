# SPDX-License-Identifier: Apache-2.0
"""The naive step: padded batches, eager, one backward a task, the classic loop over flat gradients, AdamW a tensor.

The one-pass step is measured against it and checked by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minbert_fast import surgery
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.ops import reference
from minbert_fast.recipes.recipe import OptimizerOptions, Recipe
from minbert_fast.step.extras import Extras
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.stepping import Laps, StepResult, generator_of, prefixed, reseed, surgery_of, unprefixed
from minbert_fast.step.trainable import trainable
from minbert_fast.tasks import MultitaskModel


class ReferenceStep:
    """The step of a course project: padded, eager, one backward a task over the whole graph, AdamW a tensor.

    Everything it computes with is in `minbert_fast/ops/reference.py`. In bf16 it runs under autocast.
    """

    def __init__(self, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype) -> None:
        self.model = model
        self.recipe = recipe
        self.dtype = dtype
        self.weights = surgery_of(recipe)
        self.generator = generator_of(recipe)
        parts = trainable(model, recipe)
        self.entries = {e.name: (label, e) for label, e in parts.entries()}
        self.shared = [e.parameter for label, e in self.entries.values() if label in ("shared", "words")]
        for entry in parts.frozen:
            entry.parameter.requires_grad_(False)
        self.optimizer = reference.AdamW(self._groups(recipe.optimizer), **_adamw_settings(recipe.optimizer))
        self.extras = Extras.of_entries(model, recipe, [entry for _, entry in self.entries.values()])
        self.steps = 0

    @property
    def average(self) -> WeightAverage | None:
        return self.extras.average

    def _groups(self, options: OptimizerOptions) -> list[dict[str, Any]]:
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for _, entry in self.entries.values():
            groups.setdefault((entry.lr_factor, entry.weight_decay), []).append(entry.parameter)
        return [{"params": p, "lr_factor": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]

    def __call__(self, batch: MultitaskBatch, lr_scale: float) -> StepResult:
        reseed(self.recipe.training.seed, self.steps)
        self.extras.prepare(self.steps)
        self.steps += 1
        self.model.train()
        laps = Laps(batch.packed.tokens.device)
        self.optimizer.zero_grad()
        with torch.autocast(batch.packed.tokens.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            losses = self.model.losses_padded(batch, self.extras.consistency)
        laps.lap("forward")
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * group["lr_factor"] * lr_scale
        self._backward(batch, self.extras.scaled(list(losses.values())), laps)
        values = torch.stack([loss.detach() for loss in losses.values()])
        parameters = [e.parameter for _, e in self.entries.values() if e.parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.optimizer.clip or float("inf"))
        nonfinite = ~torch.isfinite(values)
        skip = nonfinite.any() | ~torch.isfinite(norm)
        if not skip:
            self.optimizer.step()
        weighted = self.extras.after(values, batch.active_tasks(), skip)
        laps.lap("optimizer")
        return StepResult(values, norm, None, nonfinite, weighted, laps.seconds)

    def _backward(self, batch: MultitaskBatch, losses: Sequence[Tensor], laps: Laps) -> None:
        """Leaves the merged gradient in `.grad`; heads of tasks without examples have none."""
        options = self.recipe.surgery
        if options.method == "none":
            total = torch.stack(list(losses)).sum()
            (total / len(losses) if options.reduction == "mean" else total).backward()
            laps.lap("backward")
        else:
            gradients = reference.task_gradients(losses, self.shared)
            laps.lap("backward")
            if options.method == "pcgrad":
                orders = surgery.task_orders(len(losses), self.generator).tolist()
                merged = reference.pcgrad(gradients, orders, options.reduction)
            else:
                stacked = torch.stack(gradients)
                merged = self.weights(stacked @ stacked.T) @ stacked
            reference.write_gradient(self.shared, merged)
            laps.lap("surgery")
        for label, entry in self.entries.values():
            if label in batch.tasks and not batch.num_examples(label):
                entry.parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Any]]:
        tensors: dict[str, Tensor] = prefixed({"generator": self.generator.get_state()})
        scalars: dict[str, Any] = {"steps": self.steps}
        for name, (_, entry) in self.entries.items():
            state = self.optimizer.state.get(entry.parameter)
            if state:
                tensors |= {f"{name}/exp_avg": state["exp_avg"], f"{name}/exp_avg_sq": state["exp_avg_sq"]}
                scalars[f"{name}/step"] = state["step"]
        tensors |= self.extras.state_dict()
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
        self.extras.load_state_dict(tensors)
        self.generator.set_state(unprefixed(tensors)["generator"])
        self.steps = int(scalars["steps"])


def _adamw_settings(options: OptimizerOptions) -> dict[str, Any]:
    return {"lr": options.lr, "betas": options.betas, "eps": options.eps, "correct_bias": options.correct_bias}
