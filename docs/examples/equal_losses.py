# SPDX-License-Identifier: Apache-2.0
"""Dynamic task weights in one file: every task's loss counts as much as any other's, by its average so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minbert_fast.recipes.sections import WeightingOptions
from minbert_fast.step.extras.weighting import METHODS, TaskWeights


class EqualLosses(TaskWeights):
    def __init__(self, options: WeightingOptions, tasks: Sequence[str], device: torch.device, seed: int = 0) -> None:
        super().__init__(options, tasks, device, seed)
        self.sums, self.counts = self.numbers("sums"), self.numbers("counts")  # [T] each; checkpoints keep them

    def loss_weights(self) -> Tensor:
        """Factors [T] on the losses of the next step; 1 before a task's first example."""
        return torch.where(self.sums > 0, self.counts / self.sums.clamp(min=1e-8), 1.0)

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        """losses [T] before weighting; tasks `present` have examples; a step with a loss that is not finite is skipped."""
        taken = self.taken(present, skipped)
        self.sums += torch.where(taken, losses, 0.0)
        self.counts += taken


METHODS["equal_losses"] = EqualLosses
