# SPDX-License-Identifier: Apache-2.0
"""The method PCGrad: gradients without the parts that conflict (Yu et al. 2020, arXiv:2001.06782, algorithm 1).

    >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    >>> Projections()(J @ J.T)
    tensor([2.0000, 1.5000])

    g_i <- g_i - (g_i . g_j) / |g_j|^2 g_j    for every other task j in random order, where g_i . g_j < 0

Each projected g_i stays a combination of the rows of J, so the loop needs only its coefficients and G.
The optimizer wrapper of the same name, `minbert_fast.PCGrad`, is in wrapper.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.common.device import sent
from minbert_fast.ops.weights import pcgrad_reference
from minbert_fast.surgery.base import Reduction, Weights


def task_orders(tasks: int, generator: torch.Generator) -> Tensor:
    """int32 [T, T] on the host: for each task, a random order of all tasks."""
    return torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)]).int()


class Projections(Weights):
    """PCGrad's weights from G.

    The orders come from `generator` (default: one seeded with torch.initial_seed()). `state_dict` saves its state.
    """

    capturable = True

    def __init__(self, reduction: Reduction = "sum", generator: torch.Generator | None = None) -> None:
        super().__init__(reduction)
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())

    def draw(self, tasks: int) -> Tensor:
        return task_orders(tasks, self.generator)

    def __call__(self, gram: Tensor, orders: Tensor | None = None) -> Tensor:
        orders = self.draw(gram.shape[0]) if orders is None else orders
        return self.project(gram, sent(orders, gram.device))

    def project(self, gram: Tensor, orders: Tensor) -> Tensor:
        w, _ = ops.pcgrad_weights(gram.float(), orders, self.reduction == "mean")
        return w.to(gram.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())  # a checkpoint may be loaded to a GPU


class ClassicProjections(Projections):
    """PCGrad as the classic PyTorch loop computes it: j runs over task i itself, too.

    That matters from three tasks on: after two projections g_i may conflict with its original, and loses that part.
    """

    def project(self, gram: Tensor, orders: Tensor) -> Tensor:
        w, _ = pcgrad_reference(gram.double(), orders, self.reduction == "mean", skip_own=False)
        return w.to(gram.dtype)
