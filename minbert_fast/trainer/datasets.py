# SPDX-License-Identifier: Apache-2.0
"""Token tables for a recipe's tasks: finds and reads their files, and drops tasks without training data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from minbert_fast.common.schema import plain
from minbert_fast.data.cache import load_tokens
from minbert_fast.data.formats import FORMATS, DataError, find_tables
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import Task, build_tasks
from minbert_fast.trainer.progress import file_progress

SHOWN_ROWS = 3  # bad rows listed per file


@dataclass(frozen=True)
class Datasets:
    """A run's tables by task name. `recipe` lacks the tasks without training data."""

    recipe: Recipe
    tasks: dict[str, Task]
    train: dict[str, TokenTable]
    dev: dict[str, TokenTable]
    test: dict[str, TokenTable]

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and hashes of the files, which a resumed run must find unchanged."""
        return {
            split: {
                name: {"file": table.path.name, "rows": len(table), "hash": table.source_hash}
                for name, table in tables.items()
            }
            for split, tables in (("train", self.train), ("dev", self.dev))
        }


def load_datasets(recipe: Recipe, tokenizer: Tokenizer, notify: Callable[[str], None]) -> Datasets:
    """Reads the files of the recipe's tasks, or their cached tokens.

    Drops tasks without a training file. Calls `notify` with a line about each dropped task, bad row and set with cut
    sentences. Raises DataError or ConfigError.
    """
    tasks = build_tasks(recipe)
    opened: dict[tuple[Path, str], TokenTable] = {}

    def read(path: Path, dataset: str, split: str) -> TokenTable:
        data, labeled = recipe.data, split != "test"
        tokens_of = partial(load_tokens, max_bad_rows=data.max_bad_rows, cache_dir=data.cache or None, notify=notify)
        with file_progress(path.name) as progress:
            table = tokens_of(path, dataset, tokenizer, labeled=labeled, progress=progress)
        for bad in table.bad_rows[:SHOWN_ROWS]:
            notify(str(bad))
        if len(table.bad_rows) > SHOWN_ROWS:
            notify(f"{path}: {len(table.bad_rows) - SHOWN_ROWS:,} more bad rows")
        return table

    def load(split: str) -> dict[str, TokenTable]:
        chosen = {name: task for name, task in tasks.items() if split == "train" or task.predicts}
        datasets = tuple(dict.fromkeys(source.layout for task in chosen.values() for source in task.sources))
        paths = find_files(recipe, split, datasets, notify) if datasets else {}
        tables = {}
        for name, task in chosen.items():
            files = [(paths[source.layout], source.layout) for source in task.sources if source.layout in paths]
            for file in files:
                if file not in opened:
                    opened[file] = read(*file, split)
            if files:
                tables[name] = task.table([opened[file] for file in files])
        return tables

    train, dev, test = load("train"), load("dev"), load("test")
    kept = [name for name in tasks if name in train]
    if not kept:
        raise DataError(f"no training file for any task of recipe {recipe.name} ({', '.join(tasks)})")
    evaluated = [name for name in kept if name in dev and (dev[name].labels is not None or not tasks[name].labelled)]
    without_dev = [name for name in kept if tasks[name].predicts and name not in evaluated]
    if without_dev:
        best = "" if evaluated else "; best/ will be the last model"
        notify(f"no dev file for {', '.join(without_dev)}: trained, not evaluated{best}")
    for name in kept:
        cut = train[name].count_truncated(recipe.data.max_length, tasks[name].encoder)
        if cut:
            notify(f"{train[name].path}: {cut:,} rows are cut to {recipe.data.max_length} tokens (data.max_length)")
    return Datasets(
        recipe=without_tasks(recipe, [name for name in tasks if name not in train], notify),
        tasks={name: tasks[name] for name in kept},
        train={name: train[name] for name in kept},
        dev={name: dev[name] for name in evaluated},
        test={name: test[name] for name in kept if name in test},
    )


def find_files(recipe: Recipe, split: str, datasets: tuple[str, ...], notify: Callable[[str], None]) -> dict[str, Path]:
    """The split's files by dataset: those in `data.files`, the others from the data directory."""
    for dataset in recipe.data.files:
        if dataset not in FORMATS:
            raise DataError(f"data.files.{dataset}: no such dataset; known are {', '.join(FORMATS)}")
    named = {d: Path(s[split]) for d, s in recipe.data.files.items() if split in s and d in datasets}
    others = tuple(dataset for dataset in datasets if dataset not in named)
    notices: tuple[str, ...] = ()
    if others and recipe.data.files and not recipe.data.directory:
        notices = (f"no train file named for {', '.join(others)}: left out",)
    elif others:
        directory = Path(recipe.data.directory) if recipe.data.directory else sample_directory().data
        try:
            found = find_tables(directory, split, others)
            named, notices = found.paths | named, tuple(found.notices)
        except DataError:
            if split == "train" and not named:
                raise
            notices = (f"{directory}: no train files of {', '.join(others)}",)
    for notice in notices if split == "train" else ():  # the caller reports missing dev files; test files are optional
        notify(notice)
    return named


def without_tasks(recipe: Recipe, dropped: list[str], notify: Callable[[str], None]) -> Recipe:
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
