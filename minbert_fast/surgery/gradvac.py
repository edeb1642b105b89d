# SPDX-License-Identifier: Apache-2.0
"""GradVac: gradients turned until each pair's cosine reaches its running average (Wang et al. 2021, arXiv:2010.05874).

    >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    >>> GradVac()(J @ J.T)          # the first targets are 0: PCGrad
    tensor([2.0000, 1.5000])

    g_i <- g_i + |g_i| / |g_j| (p sqrt(1 - c^2) / sqrt(1 - p^2) - c) g_j    where c < p
    p   <- (1 - beta) p + beta c

for every other task j in random order, with the cosine c of g_i and g_j, and a target p for each pair (i, j).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minbert_fast.surgery.base import Reduction
from minbert_fast.surgery.pcgrad import Projections


class GradVac(Projections):
    """GradVac's weights from G, on the host in fp64. The targets [T, T] are part of `state_dict`."""

    capturable = False

    def __init__(
        self, reduction: Reduction = "sum", generator: torch.Generator | None = None, beta: float = 0.01
    ) -> None:
        super().__init__(reduction, generator)
        self.beta = beta
        self.targets = torch.zeros(0, 0, dtype=torch.float64)

    def project(self, gram: Tensor, orders: Tensor) -> Tensor:
        tasks = len(gram)
        full = gram.detach().double().cpu().numpy()
        lengths = np.sqrt(full.diagonal())
        finite = np.isfinite(full).all()  # otherwise the step is skipped, and the targets stay
        used = np.isfinite(lengths) & (lengths > 0)
        full = np.where(np.outer(used, used), full, 0.0)
        if len(self.targets) != tasks:
            self.targets = torch.zeros(tasks, tasks, dtype=torch.float64)
        targets = self.targets.numpy()  # shares its memory
        w = np.zeros(tasks)
        for i in np.flatnonzero(used):
            c = np.eye(tasks)[i]  # coefficients of g_i
            for j in orders[i].tolist():
                length = math.sqrt(max(float(c @ full @ c), 0.0))
                if j == i or not used[j] or length == 0:
                    continue
                cosine = min(max(float(c @ full[j]) / (length * lengths[j]), -1.0), 1.0)
                target = float(targets[i, j])
                if cosine < target:
                    sine, wanted = math.sqrt(1 - cosine**2), math.sqrt(max(1 - target**2, 1e-12))
                    turn = max(target * sine / wanted - cosine, 0.0)  # below 0 by rounding alone
                    c[j] += length / lengths[j] * turn
                targets[i, j] += self.beta * (cosine - target) * finite
            w += c
        return torch.from_numpy(w / tasks if self.reduction == "mean" else w).to(gram)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "targets": self.targets.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.targets = state["targets"].to("cpu", copy=True)
