# SPDX-License-Identifier: Apache-2.0
"""Token tables for a recipe's tasks: finds and reads their data, and drops tasks without training data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.data.cache import load_tokens
from minbert_fast.data.formats import FORMATS, find_tables, format_of
from minbert_fast.data.inputs import Input, find_input
from minbert_fast.data.label_summary import LabelSummary, merge_summaries, summarise_labels
from minbert_fast.data.labels import Rule
from minbert_fast.data.messages import DataError, show_path
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.sampling import hold_out
from minbert_fast.data.source import Source, sources_of
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TableView, TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import Task, build_task, build_tasks, is_kind
from minbert_fast.tasks.evaluation import check_prediction_files
from minbert_fast.trainer.completing import complete, task_tables, without_tasks
from minbert_fast.trainer.progress import file_progress

SPLITS = ("train", "dev", "test")
SHOWN_ROWS = 3  # bad rows listed per file
FEWEST_ROWS = 10  # a smaller training set is not divided to hold rows out
Rows = Mapping[str, Mapping[str, object]]  # task -> split -> rows in memory


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
    held-out set and set with cut sentences. Raises DataError or ConfigError.
    """
    reader = _Reader(recipe, tokenizer, notify, rows or {})
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
    untrained = {n for n, t in tasks.items() if n not in staged and t.predicts and reader.table(t, "dev") is not None}
    kept = [name for name in tasks if name in trained | untrained]
    dev, test, held_out = {}, {}, {}
    for name in kept:
        if not tasks[name].predicts:
            continue
        table = reader.first(name, "dev")
        if table is None and (whole := reader.first(name, "train")) is not None:
            table = _hold_out_of_training(name, whole, train, recipe, notify)
            if table is not None:
                held_out[name] = whole.source_hash
        if table is not None:
            dev[name] = table
        if (table := reader.first(name, "test")) is not None:
            test[name] = table
    without_dev = [name for name in kept if tasks[name].predicts and name not in dev]
    if without_dev:
        best = "" if dev else "; best/ will be the last model"
        notify(f"no dev rows for {', '.join(without_dev)}: trained, not evaluated{best}")
    cuts: dict[str, None] = {}  # tasks and stages that cut the same rows alike share a line
    for stage, tables in zip(stages, train, strict=True):
        limit, own = stage.data.max_length, build_tasks(stage)
        for name, table in tables.items():
            if cut := table.count_truncated(limit, own[name].encoder):
                cuts[f"{show_path(table.path)}: {cut:,} rows are cut to {limit} tokens (data.max_length)"] = None
    for line in cuts:
        notify(line)
    recipe = replace(recipe, data=replace(recipe.data, held_out=held_out))
    return Datasets(
        recipe=without_tasks(recipe, [name for name in tasks if name not in kept], notify),
        tasks={name: tasks[name] for name in kept},
        train=tuple(tables for tables in train if tables),
        dev=dev,
        test=test,
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
    reader = _Reader(recipe, tokenizer, notify, {}, training=False)
    tables, missing = {}, []
    for name, task in build_tasks(recipe).items():
        if not task.predicts or (files and name not in files):
            continue
        if files:
            table = reader.table(task, split, labeled=True, file=files[name])
        else:
            table = reader.first(name, split, labeled=True)
            if split != "test" and reader.first(name, "dev") is None:
                table = _divided(name, split, reader.first(name, "train"), recipe, notify)
        if table is None:
            missing.append(name)
        else:
            tables[name] = table
    if tables and missing:
        notify(f"no {split} rows for {', '.join(missing)}: left out")
    return tables


@dataclass
class _Reader:
    """Reads each file of a recipe once, whichever tasks and stages use it."""

    recipe: Recipe
    tokenizer: Tokenizer
    notify: Callable[[str], None]
    rows: Rows
    training: bool = True

    def __post_init__(self) -> None:
        recipe = self.recipe
        self._tables: dict[tuple[str, ...], TokenTable] = {}
        self._sources: dict[str, list[Source]] = {}  # of each task, in all stages
        staged = [each for stage in recipe.resolved_stages() for each in stage.tasks.items()]
        trained = {name for name, _ in staged}
        # A preset's own data do not count if every stage that trains the task names others.
        own = [(name, options) for name, options in recipe.tasks.items() if "data" in options or name not in trained]
        for name, options in (*own, *staged):
            known = is_kind(str(options.get("kind", name)))
            found = (
                build_task(name, options).sources
                if known
                else sources_of(options.get("data", ""), f"tasks.{name}.data")
            )
            self._sources.setdefault(name, []).extend(found)
        for name in self.rows:
            if name not in self._sources:
                raise DataError(f"data: recipe {recipe.name} has no task {name!r} (it has {', '.join(self._sources)})")
        named = dict.fromkeys(s.layout for each in self._sources.values() for s in each if is_in_directory(s))
        layouts = tuple(layout for layout in named if format_of(layout).stem)
        for dataset in recipe.data.files:
            if dataset not in FORMATS:
                raise DataError(f"data.files.{dataset}: no such dataset; known are {', '.join(FORMATS)}")
        if self.training:
            self._report_unread(layouts)
        self._paths = {s: self._find_files(s, layouts) if layouts else {} for s in SPLITS}

    def _report_unread(self, layouts: Sequence[str]) -> None:
        """Tells of data that the recipe names and no task reads: the data directory, or files of a layout."""
        data = self.recipe.data
        if data.directory and not layouts:
            self.notify(f"--data {data.directory} is not read: every task names its own data (data.directory)")
        for dataset in data.files:
            if dataset not in layouts:
                self.notify(
                    f"data.files.{dataset} is not read: no task of recipe {self.recipe.name} takes its data from it"
                )

    def summarise(self, name: str, texts: int) -> LabelSummary:
        """Summarises the training labels of task `name`, those of all stages together."""
        sources = {repr(source): source for source in self._sources[name]}  # each once
        inputs = [self._input(name, source, "train", texts) for source in sources.values()]
        return merge_summaries([summarise_labels(found) for found in inputs if found is not None])

    def first(self, name: str, split: str, labeled: bool | None = None) -> TokenTable | None:
        """The rows of a split that the recipe's task `name` has, else those of the first stage that has any.

        Raises DataError if stages name different dev or test data: one set of rows judges the whole run.
        """
        stages = (build_tasks(stage) for stage in self.recipe.resolved_stages())
        tasks = [build_tasks(self.recipe)[name], *(tasks[name] for tasks in stages if name in tasks)]
        named = dict.fromkeys(files for task in tasks if any(files := tuple(s.files(split) for s in task.sources)))
        if split != "train" and len(named) > 1:
            shown = ", ".join(" + ".join(file for files in each for file in files) for each in named)
            once = f"name the rows that judge the whole run once, in [tasks.{name}] data"
            raise DataError(f"tasks.{name}: its stages name different {split} data ({shown}): {once}")
        return next((table for task in tasks if (table := self.table(task, split, labeled)) is not None), None)

    def table(self, task: Task, split: str, labeled: bool | None = None, file: Path | None = None) -> TokenTable | None:
        """The rows of a task, from `file` if one is given; None if it has none in this split.

        `labeled` says whether labels are read (None: not those of test files, which may have none).
        """
        rule = task.rule if (split != "test" if labeled is None else labeled) else None
        sources = task.sources if file is None else (task.sources[0].with_file(split, file),)
        tables = []
        for index, source in enumerate(sources):
            found = self._input(task.name, source, split, task.num_texts if task.predicts else 0)
            if found is None:
                continue
            own = (task.name, str(index)) if task.name in self.rows else ()
            key = (repr(source), split, repr(rule), *own)
            if key not in self._tables:
                self._tables[key] = self._read(found, rule)
            tables.append(self._tables[key])
        return task.table(tables) if tables else None

    def _input(self, name: str, source: Source, split: str, texts: int) -> Input | None:
        """A source's data of one split: rows in memory, its own files, or those of its layout; None if there are none."""
        if split in self.rows.get(name, {}):
            return find_input(source, split, texts, rows=self.rows[name][split])
        if is_in_directory(source):
            path = self._paths[split].get(source.layout)
            if path is None:
                return None
            source = source.with_file(split, path)
        return find_input(source, split, texts)

    def _find_files(self, split: str, datasets: tuple[str, ...]) -> dict[str, Path]:
        """The split's files by dataset: those in `data.files`, the others from the data directory.

        To train, raises DataError without any training file, and tells of missing ones.
        """
        data = self.recipe.data
        named = {d: Path(s[split]) for d, s in data.files.items() if split in s and d in datasets}
        others = tuple(dataset for dataset in datasets if dataset not in named)
        required = self.training and split == "train"
        notices: tuple[str, ...] = ()
        if others and data.files and not data.directory:
            notices = (f"no train file named for {', '.join(others)}: left out",)
        elif others:
            directory = Path(data.directory) if data.directory else sample_directory().data
            try:
                found = find_tables(directory, split, others)
                named, notices = found.paths | named, tuple(found.notices)
            except DataError:
                if required and not named:
                    raise
                notices = (f"{directory}: no train files of {', '.join(others)}",)
        for notice in notices if required else ():  # the caller reports missing dev files; test files are optional
            self.notify(notice)
        return named

    def _read(self, found: Input, rule: Rule | None) -> TokenTable:
        data = self.recipe.data
        with file_progress(found.name) as progress:
            table = load_tokens(
                found,
                rule,
                self.tokenizer,
                max_bad_rows=data.max_bad_rows,
                cache_dir=data.cache or None,
                progress=progress,
                notify=self.notify,
            )
        for bad in table.bad_rows[:SHOWN_ROWS]:
            self.notify(str(bad))
        if len(table.bad_rows) > SHOWN_ROWS:
            self.notify(f"{found.name}: {len(table.bad_rows) - SHOWN_ROWS:,} more bad rows")
        return table


def names_data(recipe: Recipe) -> bool:
    """Whether any task of the recipe or its stages names files or a data set of the hub."""
    sources = [source for _, options in task_tables(recipe) for source in sources_of(options.get("data", ""))]
    return any(not source.layout or not is_in_directory(source) for source in sources)


def is_in_directory(source: Source) -> bool:
    """Whether the source names only a layout, whose files are in the data directory or in `data.files`."""
    return bool(source.layout) and not (source.hub or any(source.files(split) for split in SPLITS))


def _hold_out_of_training(
    name: str, whole: TokenTable, train: list[dict[str, TokenTable]], recipe: Recipe, notify: Callable[[str], None]
) -> TokenTable | None:
    """Takes dev rows from `whole`, a task's training rows; no stage trains on them, also if it reads other files too."""
    held = _held_out(whole, recipe)
    if held is None:
        return None
    lines: dict[Path, np.ndarray] = {}  # the held-out ones of each file
    for path, part, rows in _files(whole):
        lines[path] = np.append(lines.get(path, part[:0]), part[np.isin(rows, held)])
    for tables in train:
        if name in tables:
            taken = np.concatenate([np.isin(part, lines.get(path, part[:0])) for path, part, _ in _files(tables[name])])
            tables[name] = tables[name].select(np.flatnonzero(~taken)) if taken.any() else tables[name]
    notify(
        f"no dev rows for {name}: {len(held):,} of {len(whole):,} training rows are held out for it "
        f"(data.holdout = {recipe.data.holdout:g}, seed {recipe.training.seed})"
    )
    return whole.select(held)


def _divided(
    name: str, split: str, whole: TokenTable | None, recipe: Recipe, notify: Callable[[str], None]
) -> TokenTable | None:
    """The training rows that the run held out (dev) or kept (train); None if they cannot be told."""
    then = recipe.data.held_out.get(name)
    if whole is None:
        return None
    if then is None:  # the run had dev rows of its own, and trained on all of `whole`
        return whole if split == "train" else None
    if whole.source_hash != then:
        notify(f"{show_path(whole.path)}: changed since the run held dev rows of {name} out of it: they cannot be told")
        return None
    held = _held_out(whole, recipe)
    if split == "dev":
        return None if held is None else whole.select(held)
    return whole if held is None else whole.select(np.setdiff1d(np.arange(len(whole)), held))


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


def _held_out(whole: TokenTable, recipe: Recipe) -> np.ndarray | None:
    """The numbers of the rows to hold out, the same ones in every run with the recipe's share and seed; None: no rows."""
    if not recipe.data.holdout or len(whole) < FEWEST_ROWS:
        return None
    return hold_out(whole, recipe.data.holdout, recipe.training.seed)[1]
