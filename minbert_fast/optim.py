# SPDX-License-Identifier: Apache-2.0
"""AdamW with the course's signature and semantics, for course code; the trainer's own step is one flat pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


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
        if lr < 0.0:
            raise ValueError(f"lr = {lr}: expected 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas = {betas}: expected 0 <= beta < 1")
        if eps < 0.0:
            raise ValueError(f"eps = {eps}: expected 0 or more")
        if weight_decay < 0.0:
            raise ValueError(f"weight_decay = {weight_decay}: expected 0 or more")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
            if p.grad.is_sparse:
                raise RuntimeError("AdamW takes dense gradients; use SparseAdam for sparse ones")
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
        lr = group["lr"]
        values: list[Tensor] = list(parameters)
        gradients = [p.grad for p in parameters]
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
