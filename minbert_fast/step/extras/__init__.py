# SPDX-License-Identifier: Apache-2.0
"""What a recipe may add to a plain step: averaged weights, dynamic task weights, R-Drop, SMART.

One object a step, so that the step itself calls each of its moments once: before the step, over the batch, over the losses,
after the step, into a checkpoint and out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.extras.smart import Adversary, Teacher
from minbert_fast.step.extras.weighting import task_weights
from minbert_fast.step.flat import Entry, FlatParameters
from minbert_fast.tasks import ConsistencyLoss, MultitaskModel


class Extras:
    """The additions of one stage; each is None where `recipe` does not ask for it."""

    def __init__(
        self,
        model: MultitaskModel,
        recipe: Recipe,
        average: WeightAverage | None,
        adversary: Adversary | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        asked = recipe.regularisation
        self.model = model
        self.average = average
        self.adversary = adversary
        self.teacher = teacher
        self.consistency = ConsistencyLoss(asked.smart or asked.r_drop, both=not asked.smart)
        self.weighting = task_weights(recipe.weighting, list(recipe.tasks), next(model.parameters()).device)

    @classmethod
    def of_flat(cls, model: MultitaskModel, recipe: Recipe, flat: FlatParameters, dtype: torch.dtype) -> Extras:
        """For a step over flat buffers, with products in `dtype`."""
        asked = recipe.regularisation
        adversary = Adversary(model, flat, asked) if asked.smart else None
        teacher = Teacher(model, flat, asked, dtype) if asked.proximal else None
        return cls(model, recipe, WeightAverage.of_flat(recipe.training.ema, flat), adversary, teacher)

    @classmethod
    def of_entries(cls, model: MultitaskModel, recipe: Recipe, entries: Sequence[Entry]) -> Extras:
        """For a step over parameters that each have a memory of their own; it has no SMART (`smart.check_smart`)."""
        return cls(model, recipe, WeightAverage.of_entries(recipe.training.ema, entries))

    def prepare(self, step: int) -> None:
        """The host's part before step number `step` (from 0), outside a captured graph."""
        if self.weighting is not None:
            self.weighting.prepare(step)

    def noise(self, batch: MultitaskBatch, bounds: Tensor, seed: Tensor) -> Tensor | None:
        """What to add to the embeddings [N, H], if anything."""
        return None if self.adversary is None else self.adversary.noise(batch, bounds, seed)

    def losses(self, batch: MultitaskBatch, hidden: Tensor) -> dict[str, Tensor]:
        """The model's losses, with what else is asked of its answers."""
        if self.teacher is not None:
            return self.teacher.losses(self.model, batch, hidden, self.consistency)
        return self.model.losses(batch, hidden, consistency=self.consistency)

    def scaled(self, losses: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each loss times its dynamic weight."""
        return losses if self.weighting is None else self.weighting.scaled(losses)

    def after(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> Tensor | None:
        """Takes note of a step: the losses [T] of tasks `present`, whether it was `skipped` ([] bool, on the device).

        Returns the dynamic weights [T] that the step had, if any.
        """
        for follower in (self.average, self.teacher):
            if follower is not None:
                follower.update(skipped)
        if self.weighting is None:
            return None
        weights = self.weighting.weights()
        self.weighting.observe(losses, present, skipped)
        return weights

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for part in (self.average, self.weighting, self.teacher):
            tensors |= {} if part is None else part.state_dict()
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; other tensors are passed over. Raises ValueError where one is missing."""
        for part in (self.average, self.weighting, self.teacher):
            if part is not None:
                part.load_state_dict(tensors)
