# SPDX-License-Identifier: Apache-2.0
"""From a recipe to token tables: which files, which tasks are left, and what to tell the user about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
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
from minbert_fast.trainer.progress import FileProgress

SHOWN_ROWS = 3  # bad rows named one by one, per file


@dataclass(frozen=True)
class Datasets:
    """A run's tables by task name. `recipe` is the recipe without the tasks that have no training data."""

    recipe: Recipe
    tasks: dict[str, Task]
    train: dict[str, TokenTable]
    dev: dict[str, TokenTable]
    test: dict[str, TokenTable]

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find unchanged."""
        return {
            split: {
                name: {"file": table.path.name, "rows": len(table), "hash": table.source_hash}
                for name, table in tables.items()
            }
            for split, tables in (("train", self.train), ("dev", self.dev))
        }


def load_datasets(recipe: Recipe, tokenizer: Tokenizer, say: Callable[[str], None]) -> Datasets:
    """Reads (or finds in the cache) the files of the recipe's tasks.

    A task without a training file is dropped, and `say` hears of it, as of bad rows and cut sentences. Raises
    DataError or ConfigError.
    """
    tasks = build_tasks(recipe)
    opened: dict[tuple[Path, str], TokenTable] = {}

    def load(split: str) -> dict[str, TokenTable]:
        chosen = tasks if split == "train" else {name: task for name, task in tasks.items() if task.predicts}
        wanted = tuple(dict.fromkeys(source for task in chosen.values() for source in task.sources))
        paths = find_files(recipe, split, wanted, say) if wanted else {}
        tables = {}
        for name, task in chosen.items():
            there = [(paths[source], source) for source in task.sources if source in paths]
            for path, source in there:
                if (path, source) not in opened:
                    opened[path, source] = _load(recipe, path, source, split, tokenizer, say)
            if there:
                tables[name] = task.table([opened[key] for key in there])
        return tables

    train, dev, test = load("train"), load("dev"), load("test")
    kept = [name for name in tasks if name in train]
    if not kept:
        raise DataError(f"no training file for any task of recipe {recipe.name} ({', '.join(tasks)})")
    judged = [name for name in kept if name in dev and dev[name].labels is not None]
    unjudged = [name for name in kept if tasks[name].predicts and name not in judged]
    if unjudged:
        best = "" if judged else "; best/ will be the last model"
        say(f"no dev file for {', '.join(unjudged)}: trained, not evaluated{best}")
    for name in kept:
        cut = train[name].count_truncated(recipe.data.max_length, tasks[name].encoder)
        if cut:
            say(f"{train[name].path}: {cut:,} rows are cut to {recipe.data.max_length} tokens (data.max_length)")
    return Datasets(
        recipe=without_tasks(recipe, [name for name in tasks if name not in train], say),
        tasks={name: tasks[name] for name in kept},
        train={name: train[name] for name in kept},
        dev={name: dev[name] for name in judged},
        test={name: test[name] for name in kept if name in test},
    )


def find_files(recipe: Recipe, split: str, wanted: tuple[str, ...], say: Callable[[str], None]) -> dict[str, Path]:
    """The files of a split by dataset: those named one by one, else those in the data directory."""
    for dataset in recipe.data.files:
        if dataset not in FORMATS:
            raise DataError(f"data.files.{dataset}: no such dataset; known are {', '.join(FORMATS)}")
    named = {d: Path(s[split]) for d, s in recipe.data.files.items() if split in s and d in wanted}
    others = tuple(dataset for dataset in wanted if dataset not in named)
    if not others or (recipe.data.files and not recipe.data.directory):
        if others and split == "train":
            say(f"no train file named for {', '.join(others)}: left out")
        return named
    directory = Path(recipe.data.directory) if recipe.data.directory else sample_directory().data
    if split != "train":  # a test file that is not there is no news, and a dev file is the caller's to miss
        with suppress(DataError):
            return find_tables(directory, split, others).paths | named
        return named
    try:
        found = find_tables(directory, split, others)
    except DataError:
        if not named:
            raise
        say(f"{directory}: no train files of {', '.join(others)}")
        return named
    for notice in found.notices:
        say(notice)
    return found.paths | named


def _load(
    recipe: Recipe, path: Path, dataset: str, split: str, tokenizer: Tokenizer, say: Callable[[str], None]
) -> TokenTable:
    with FileProgress(path.name) as progress:
        table = load_tokens(
            path,
            dataset,
            tokenizer,
            labeled=split != "test",
            max_bad_rows=recipe.data.max_bad_rows,
            cache_dir=recipe.data.cache or None,
            progress=progress,
            notify=say,
        )
    for bad in table.bad_rows[:SHOWN_ROWS]:
        say(str(bad))
    if len(table.bad_rows) > SHOWN_ROWS:
        say(f"{path}: {len(table.bad_rows) - SHOWN_ROWS:,} more bad rows")
    return table


def without_tasks(recipe: Recipe, dropped: list[str], say: Callable[[str], None]) -> Recipe:
    """The recipe with tasks taken out, of its stages too; a stage without any task left is dropped."""
    if not dropped:
        return recipe

    def left(tasks: Mapping[str, Any]) -> dict[str, Any]:
        return {name: options for name, options in tasks.items() if name not in dropped}

    stages: list[Mapping[str, Any]] = []
    for index, stage in enumerate(recipe.stages):
        kept = left(stage.get("tasks", recipe.tasks))
        if kept:
            stages.append({**stage, "tasks": kept} if "tasks" in stage else stage)
        else:
            say(f"stage {index + 1} has no task left and is left out")
    tasks = left(recipe.tasks) or left({name: o for stage in stages for name, o in stage["tasks"].items()})
    return replace(recipe, tasks=plain(tasks), stages=tuple(stages))
