# SPDX-License-Identifier: Apache-2.0
"""A run's token tables by task: the rows that it trains on, evaluates and holds out. Drops tasks without training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minbert_fast.common.schema import check
from minbert_fast.data.messages import DataError, show_path
from minbert_fast.data.sampling import hold_out
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TableView, TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.recipes.sections import DataOptions
from minbert_fast.tasks import Task, build_tasks
from minbert_fast.tasks.inference.evaluation import check_prediction_files
from minbert_fast.trainer.completing import complete, without_tasks
from minbert_fast.trainer.table_reader import Rows, TableReader, is_in_directory

FEWEST_ROWS = 10  # a smaller training set is not divided to hold rows out
NO_ROWS = "names no training rows; expected train = a file, hub = a data set that has such a split, or a layout"
REPEATED = 0.01  # share of a task's dev rows; so many with the texts of training rows are worth a line


class HeldOut(NamedTuple):
    """Training rows that serve as dev rows of the tasks that have the same texts."""

    rows: np.ndarray  # their numbers, ascending
    source_hash: str  # of all that they were drawn from
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Datasets:
    """A run's tables by task name. `recipe` is complete, and lacks the tasks without training data."""

    recipe: Recipe
    tasks: dict[str, Task]
    train: tuple[dict[str, TokenTable], ...]  # by stage: the tables of the tasks that it trains
    dev: dict[str, TokenTable]
    test: dict[str, TokenTable]

    def fingerprint(self) -> dict[str, Any]:
        """Names, sizes and hashes of the data, which a resumed run must find unchanged."""
        stages = {"train" if i == 0 else f"train (stage {i + 1})": tables for i, tables in enumerate(self.train)}
        return {
            split: {
                name: {"file": table.path.name, "rows": len(table), "hash": table.source_hash}
                for name, table in tables.items()
            }
            for split, tables in (*stages.items(), ("dev", self.dev))
        }


def load_datasets(
    recipe: Recipe, tokenizer: Tokenizer, notify: Callable[[str], None], rows: Rows | None = None
) -> Datasets:
    """Reads the data of the recipe's tasks, or their cached tokens; `rows` in memory replace files.

    Completes the recipe (see completing.py). Drops tasks without training data; a task that no stage trains is kept and
    evaluated, with its untrained head, if it has dev rows. Calls `notify` with a line about each dropped task, bad row,
    held-out set, set with cut sentences, and task whose dev rows repeat training rows. Raises DataError or ConfigError.
    """
    reader = TableReader(recipe, tokenizer, notify, rows or {})
    recipe = reader.recipe = complete(recipe, reader.summarise, notify, rows or {})
    tasks = build_tasks(recipe)
    check_prediction_files(tasks)
    train: list[dict[str, TokenTable]] = []
    stages = recipe.resolved_stages()
    for stage in stages:
        found = {name: reader.table(task, "train") for name, task in build_tasks(stage).items()}
        train.append({name: table for name, table in found.items() if table is not None})
    trained = {name for tables in train for name in tables}
    if not trained:
        raise DataError(f"no training data for any task of recipe {recipe.name} ({', '.join(tasks)})")
    staged = {name for stage in stages for name in stage.tasks}
    for name, task in tasks.items():
        layouts = task.sources and all(map(is_in_directory, task.sources))  # the reader tells of those without a file
        check(layouts or name in trained or name not in staged, f"tasks.{name}.data: {NO_ROWS}")
    untrained = {n for n, t in tasks.items() if n not in staged and t.predicts and reader.table(t, "dev") is not None}
    kept = [name for name in tasks if name in trained | untrained]
    for name in tasks:
        if name not in staged | untrained:
            notify(f"{name}: no stage trains it, and it has no dev rows: left out")
    dev, test, divided = {}, {}, {}
    for name in kept:
        if not tasks[name].predicts:
            for split in ("dev", "test"):
                if reader.names(tasks[name], split):
                    notify(f"tasks.{name}.data.{split} is not read: {tasks[name].kind} only trains")
            continue
        if (table := reader.first(name, "dev")) is not None:
            dev[name] = table
        elif (table := reader.first(name, "train")) is not None:
            divided[name] = table
        if (table := reader.first(name, "test")) is not None:
            test[name] = table
    held_out = _held_out(divided, recipe)
    if held_out:
        _take_out(divided, held_out, train, recipe, notify)
    elif not divided and dev and recipe.data.holdout not in (0, DataOptions.holdout):
        notify(f"data.holdout = {recipe.data.holdout:g} is not used: every task has dev rows of its own")
    dev |= {name: divided[name].select(held.rows) for name, held in held_out.items()}
    dev = {name: dev[name] for name in kept if name in dev}
    without_dev = [name for name in kept if tasks[name].predicts and name not in dev]
    if without_dev:
        best = "" if dev else "; best/ will be the last model"
        notify(f"no dev rows for {', '.join(without_dev)}: trained, not evaluated{best}")
    _report_cuts(stages, train, notify)
    _report_repeats(train, dev, notify)
    hashes = {name: held.source_hash for name, held in held_out.items()}
    recipe = replace(recipe, data=replace(recipe.data, held_out=hashes))
    return Datasets(
        recipe=without_tasks(recipe, [name for name in tasks if name not in kept], notify),
        tasks={name: tasks[name] for name in kept},
        train=tuple(tables for tables in train if tables),
        dev=dev,
        test=test,
    )


def _report_cuts(
    stages: Sequence[Recipe], train: Sequence[Mapping[str, TokenTable]], notify: Callable[[str], None]
) -> None:
    """A line for each set of rows that a stage cuts; tasks and stages that cut the same rows alike share it."""
    cuts: dict[str, None] = {}
    for stage, tables in zip(stages, train, strict=True):
        limit, own = stage.data.max_length, build_tasks(stage)
        for name, table in tables.items():
            if cut := table.count_truncated(limit, own[name].encoder):
                cuts[f"{show_path(table.path)}: {cut:,} rows are cut to {limit} tokens (data.max_length)"] = None
    for line in cuts:
        notify(line)


def _report_repeats(
    train: Sequence[Mapping[str, TokenTable]], dev: Mapping[str, TokenTable], notify: Callable[[str], None]
) -> None:
    """A line for each task some of whose dev rows repeat the texts of rows that a stage trains it on."""
    for name, table in dev.items():
        repeated = max((table.count_repeated(tables[name]) for tables in train if name in tables), default=0)
        if repeated > REPEATED * len(table):
            notify(
                f"{repeated:,} of {len(table):,} dev rows of {name} repeat the texts of training rows, "
                "so they are easier than new texts"
            )


def load_split(
    recipe: Recipe,
    tokenizer: Tokenizer,
    split: str,
    notify: Callable[[str], None],
    files: Mapping[str, Path] | None = None,
) -> dict[str, TokenTable]:
    """The labelled rows of a split (train, dev or test) by task, for the tasks of a saved recipe that have any.

    `files` replace the recipe's data of the tasks that they name, and only these tasks are read. Without dev data, a task's
    dev rows are those that its run held out, and its train rows the others. Raises DataError or ConfigError.
    """
    reader = TableReader(recipe, tokenizer, notify, {}, training=False)
    tables, missing, tasks = {}, [], build_tasks(recipe)
    names = [] if files or split == "test" else [name for name in recipe.data.held_out if name in tasks]
    divided = {name: reader.first(name, "train") for name in names}
    held_out = _held_out({name: whole for name, whole in divided.items() if whole is not None}, recipe)
    for name, task in tasks.items():
        if not task.predicts or (files and name not in files):
            continue
        if files:
            table = reader.table(task, split, labeled=True, file=files[name])
        else:
            table = reader.first(name, split, labeled=True)
            if split != "test" and reader.first(name, "dev") is None:
                table = _divided(name, split, reader.first(name, "train"), held_out.get(name), recipe, notify)
        if table is None:
            missing.append(name)
        else:
            tables[name] = table
    if tables and missing:
        notify(f"no {split} rows for {', '.join(missing)}: left out")
    return tables


def _take_out(
    divided: Mapping[str, TokenTable],
    held_out: Mapping[str, HeldOut],
    train: Sequence[dict[str, TokenTable]],
    recipe: Recipe,
    notify: Callable[[str], None],
) -> None:
    """Takes each task's held-out rows out of `train`, whatever else a stage reads, and other tasks' rows of these texts."""
    for name, held in held_out.items():
        whole = divided[name]
        lines: dict[Path, np.ndarray] = {}  # the held-out ones of each file
        for path, part, rows in _files(whole):
            lines[path] = np.append(lines.get(path, part[:0]), part[np.isin(rows, held.rows)])
        for tables in train:
            if name in tables:
                taken = [np.isin(part, lines.get(path, part[:0])) for path, part, _ in _files(tables[name])]
                _drop(tables, name, np.concatenate(taken))
        notify(
            f"no dev rows for {name}: {len(held.rows):,} of {len(whole):,} training rows are held out for it "
            f"(data.holdout = {recipe.data.holdout:g}, seed {recipe.training.seed})"
        )
    for name, held in held_out.items():
        texts = np.concatenate([column.hashes for column in divided[name].select(held.rows).columns])
        for tables in train:
            for other in [each for each in tables if each not in held.tasks]:
                taken = np.all([np.isin(column.hashes, texts) for column in tables[other].columns], axis=0)
                if count := _drop(tables, other, taken):
                    notify(f"{count:,} training rows of {other} have texts that are held out for {name}: left out")


def _drop(tables: dict[str, TokenTable], name: str, taken: np.ndarray) -> int:
    """Takes the rows `taken` [n] bool out of a table, and returns their number."""
    if taken.any():
        tables[name] = tables[name].select(np.flatnonzero(~taken))
    return int(taken.sum())


def _divided(
    name: str,
    split: str,
    whole: TokenTable | None,
    held: HeldOut | None,
    recipe: Recipe,
    notify: Callable[[str], None],
) -> TokenTable | None:
    """The training rows that the run held out (dev) or kept (train); None if they cannot be told."""
    then = recipe.data.held_out.get(name)
    if whole is None:
        return None
    if then is None:  # the run had dev rows of its own, and trained on all of `whole`
        return whole if split == "train" else None
    if held is None or held.source_hash != then:
        notify(f"{show_path(whole.path)}: changed since the run held dev rows of {name} out of it: they cannot be told")
        return None
    return whole.select(held.rows if split == "dev" else np.setdiff1d(np.arange(len(whole)), held.rows))


def _files(table: TokenTable) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """The files of a whole table: the path, the lines where its rows begin, and the numbers of these rows in the table."""
    parts, first = [table], 0
    while parts:
        part = parts.pop(0)
        if isinstance(part, TableView):
            parts = [*part.parts, *parts]
        else:
            yield part.path, part.lines, np.arange(first, first + len(part))
            first += len(part)


def _held_out(divided: Mapping[str, TokenTable], recipe: Recipe) -> dict[str, HeldOut]:
    """The rows to hold out of each task's training rows, by task: the same in every run with the recipe's share and seed.

    Tasks with the same texts hold out the same rows: a text that judges one of them trains none.
    """
    alike: dict[bytes, list[str]] = {}
    for name, whole in divided.items():
        if recipe.data.holdout and len(whole) >= FEWEST_ROWS:
            alike.setdefault(whole.hashes.tobytes() + bytes([whole.arity]), []).append(name)
    held_out: dict[str, HeldOut] = {}
    for names in alike.values():
        first, *others = (divided[name] for name in names)
        rows = hold_out(first, recipe.data.holdout, recipe.training.seed, others)[1]
        hashes = " ".join(divided[name].source_hash for name in names)
        held_out |= dict.fromkeys(names, HeldOut(rows, hashes, tuple(names)))
    return held_out
