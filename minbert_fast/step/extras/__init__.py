# SPDX-License-Identifier: Apache-2.0
"""The hooks that a recipe can add to a plain step: averaged weights, dynamic task weights, R-Drop, SMART."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.extras.consistency import Adversary, Consistency, Teacher
from minbert_fast.step.extras.weighting import task_weights
from minbert_fast.step.flat import FlatParameters, ParameterSpec
from minbert_fast.step.hooks import StepHook
from minbert_fast.tasks import MultitaskModel


def flat_hooks(model: MultitaskModel, recipe: Recipe, flat: FlatParameters, dtype: torch.dtype) -> list[StepHook]:
    """The hooks of a step over flat buffers, with matrix products in `dtype`. Empty for a plain recipe."""
    options = recipe.regularisation
    adversary = Adversary(model, flat, options) if options.smart else None
    teacher = Teacher(model, flat, options, dtype) if options.proximal else None
    hooks = (
        Consistency(model, options, adversary, teacher) if options.duplicates_examples or options.proximal else None,
        task_weights(recipe.weighting, list(recipe.tasks), flat.data.device, recipe.training.seed),
        WeightAverage.of_flat(recipe.training.ema, flat) if recipe.training.ema else None,
    )
    return [hook for hook in hooks if hook is not None]


def separate_hooks(model: MultitaskModel, recipe: Recipe, specs: Sequence[ParameterSpec]) -> list[StepHook]:
    """The hooks of a step whose parameters are separate tensors. SMART needs flat buffers (`check_smart`)."""
    hooks = (
        Consistency(model, recipe.regularisation) if recipe.regularisation.duplicates_examples else None,
        task_weights(recipe.weighting, list(recipe.tasks), next(model.parameters()).device, recipe.training.seed),
        WeightAverage.of_parameters(recipe.training.ema, specs) if recipe.training.ema else None,
    )
    return [hook for hook in hooks if hook is not None]
