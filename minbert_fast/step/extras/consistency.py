# SPDX-License-Identifier: Apache-2.0
"""Consistency regularisation: penalties for outputs that change under dropout (R-Drop) or perturbation (SMART)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import RegularisationOptions
from minbert_fast.step.extras.smart import Adversary, Teacher
from minbert_fast.step.hooks import StepHook
from minbert_fast.tasks import ConsistencyLoss, MultitaskModel


class Consistency(StepHook):
    """R-Drop's penalty, or SMART's with its adversary, or that of a momentum teacher; `options` says which."""

    def __init__(
        self,
        model: MultitaskModel,
        options: RegularisationOptions,
        adversary: Adversary | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.model = model
        self.adversary = adversary
        self.teacher = teacher
        self.consistency = ConsistencyLoss(options.smart or options.r_drop, both=not options.smart)

    def embedding_noise(self, batch: MultitaskBatch, bounds: Tensor, seed: Tensor) -> Tensor | None:
        return None if self.adversary is None else self.adversary.noise(batch, bounds, seed)

    def losses(self, batch: MultitaskBatch, hidden: Tensor) -> dict[str, Tensor]:
        if self.teacher is not None:
            return self.teacher.losses(self.model, batch, hidden, self.consistency)
        return self.model.losses(batch, hidden, consistency=self.consistency)

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        if self.teacher is not None:
            self.teacher.update(skipped)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.teacher is None else self.teacher.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Any]) -> None:
        if self.teacher is not None:
            self.teacher.load_state_dict(tensors)
