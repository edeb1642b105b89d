# SPDX-License-Identifier: Apache-2.0
"""Makes the training step of a `--backend`."""

from __future__ import annotations

from typing import Literal

import torch

from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.hooks import Connect
from minbert_fast.step.naive import ReferenceStep
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.step.stepping import TrainingStep
from minbert_fast.tasks import MultitaskModel

Backend = Literal["fast", "reference"]


def make_step(
    backend: Backend, model: MultitaskModel, recipe: Recipe, dtype: torch.dtype, connect: Connect | None = None
) -> TrainingStep:
    """The step of one stage, on the model's device. `recipe` is the stage's own; matrix products run in fp32 or bf16.

    `connect` makes the exchange between several processes. The reference backend runs in one process only.
    """
    if backend == "reference":
        return ReferenceStep(model, recipe, dtype)
    return OnePassStep(model, recipe, dtype, connect)
