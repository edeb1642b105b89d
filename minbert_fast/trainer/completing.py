# SPDX-License-Identifier: Apache-2.0
"""Completes a recipe from its training data: kinds, classes, ranges and class weights that the recipe leaves open.

The values that are found become part of the recipe, and so of the model directory and of every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from minbert_fast.common.imports import missing
from minbert_fast.common.schema import ConfigError, check, merge, plain
from minbert_fast.data.label_summary import LabelSummary
from minbert_fast.data.source import sources_of
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import build_tasks, guess_kind, is_kind

Summarise = Callable[[str, int], LabelSummary]  # (task, texts per example) -> what its training labels hold


def complete(
    recipe: Recipe, summarise: Summarise, notify: Callable[[str], None], in_memory: Collection[str] = ()
) -> Recipe:
    """`recipe` with a kind for each task, and with every value that a task finds in its training labels.

    The kind of a task with files or rows `in_memory` is guessed if its `kind` is empty, or if it has no `kind` and its name
    is not that of one; `notify` gets a line for each guess. Raises ConfigError if the labels do not fit a task.
    """
    absent = missing(recipe.imports)  # files that may define a kind: without them no kind is guessed
    guessed: dict[str, str] = {}  # a line for each guess
    tables: dict[str, Mapping[str, Any]] = {}  # a task's first table counts
    for name, options in task_tables(recipe):
        tables.setdefault(name, options)
    for name, options in tables.items():
        if absent or options.get("kind") or ("kind" not in options and is_kind(name)):
            continue
        if not options.get("data") and name not in in_memory:
            continue
        texts = max((len(source.texts) for source in sources_of(options.get("data", ""))), default=0) or 1
        try:
            kind, reason = guess_kind(summarise(name, texts), texts)
        except ConfigError as error:
            raise ConfigError(f"tasks.{name}: {error}") from None
        guessed[name] = f'tasks.{name}: kind = "{kind}" ({reason})'
        recipe = with_task_values(recipe, name, {"kind": kind})
    for name, task in build_tasks(recipe).items():
        named = next((source.label for source in task.sources if source.label), "") if task.rule is None else ""
        check(not named, f"tasks.{name}: label = {named!r}: {task.kind} reads no labels; expected data without label")
        values = {} if task.resolved else task.resolve(summarise(name, task.num_texts))
        if name in guessed:
            notify(guessed[name])  # only now: the labels are not refused
        recipe = with_task_values(recipe, name, values)
        if alike := _alike(values.get("classes", ())):
            merged = 'data.values = { OLD = "NEW" } merges classes'
            notify(f"tasks.{name}: classes that differ in case alone: {'; '.join(alike)} ({merged})")
    for index, stage in enumerate(recipe.resolved_stages() if recipe.stages else ()):
        for name, task in build_tasks(stage).items():
            if not task.resolved:  # a stage may balance classes where the recipe does not
                found = {"tasks": {name: task.resolve(summarise(name, task.num_texts))}}
                stages = [merge(own, found) if i == index else own for i, own in enumerate(recipe.stages)]
                recipe = replace(recipe, stages=tuple(stages))
    return recipe


def _alike(classes: Sequence[str]) -> list[str]:
    """Names that differ in case alone, one line for each group of them."""
    spellings: dict[str, list[str]] = {}
    for each in classes:
        spellings.setdefault(each.casefold(), []).append(each)
    return [", ".join(group) for group in spellings.values() if len(group) > 1]


def task_tables(recipe: Recipe) -> list[tuple[str, Mapping[str, Any]]]:
    """The name and the options of every task of the recipe, then of those of its stages; a name may come again."""
    tables = (recipe.tasks, *(stage.get("tasks", {}) for stage in recipe.stages))
    return [(name, options) for tasks in tables for name, options in tasks.items()]


def with_task_values(recipe: Recipe, name: str, values: Mapping[str, Any]) -> Recipe:
    """The recipe with `values` added to the options of task `name`, wherever the recipe has them."""
    if name in recipe.tasks:
        return replace(recipe, tasks=plain({**recipe.tasks, name: merge(recipe.tasks[name], values)}))

    def add(stage: Mapping[str, Any]) -> Mapping[str, Any]:
        tasks = stage.get("tasks", {})
        return {**stage, "tasks": {**tasks, name: merge(tasks[name], values)}} if name in tasks else stage

    return replace(recipe, stages=tuple(add(stage) for stage in recipe.stages))


def without_tasks(recipe: Recipe, dropped: Sequence[str], notify: Callable[[str], None]) -> Recipe:
    """The recipe and its stages without the `dropped` tasks; stages that lose all their tasks are removed."""
    if not dropped:
        return recipe

    def keep(tasks: Mapping[str, Any]) -> dict[str, Any]:
        return {name: options for name, options in tasks.items() if name not in dropped}

    stages: list[Mapping[str, Any]] = []
    for index, stage in enumerate(recipe.stages):
        kept = keep(stage.get("tasks", recipe.tasks))
        if kept:
            stages.append({**stage, "tasks": kept} if "tasks" in stage else stage)
        else:
            notify(f"stage {index + 1} has no task left and is left out")
    tasks = keep(recipe.tasks) or keep({name: o for stage in stages for name, o in stage["tasks"].items()})
    return replace(recipe, tasks=plain(tasks), stages=tuple(stages))
