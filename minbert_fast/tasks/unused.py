# SPDX-License-Identifier: Apache-2.0
"""Values of a recipe that have no effect, such as a `temperature` without a loss that has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks.model import build_tasks
from minbert_fast.tasks.presets import PRESETS


def unused_values(recipe: Recipe) -> Iterator[str]:
    """A line for each value of a resolved stage that differs from its default and has no effect.

    There is none where a task's table also sets the key that would read the value: a recipe that extends another, and turns
    something off, inherits values of what it turned off.
    """
    for section in ("optimizer", "weighting", "regularisation"):
        options = getattr(recipe, section)
        yield from _unused(options, options.unused(), section)
    for name, task in build_tasks(recipe).items():
        yield from _unused(task.options, recipe.tasks[name], f"tasks.{name}", PRESETS.get(task.preset, {}))


def _unused(options: Any, given: Collection[str], where: str, preset: Mapping[str, Any] | None = None) -> Iterator[str]:
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for key, reader in options.unused().items():
        value, usual = getattr(options, key), (preset or {}).get(key)
        usual = tuple(usual) if isinstance(usual, list) else usual
        if key in given and reader not in given and value not in (defaults[key], usual):
            yield f"{where}.{key} = {value!r} is not used: it belongs to {reader}"
