# SPDX-License-Identifier: Apache-2.0
"""Finds and reads the data of a recipe's tasks: each file once, as tokens, whichever tasks and stages use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minbert_fast.data.cache import load_tokens
from minbert_fast.data.formats import FORMATS, find_tables, format_of
from minbert_fast.data.inputs import Input, find_input
from minbert_fast.data.label_summary import LabelSummary, merge_summaries, summarise_labels
from minbert_fast.data.labels import Rule
from minbert_fast.data.messages import DataError
from minbert_fast.data.sample import sample_directory
from minbert_fast.data.source import Source, sources_of
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import Task, build_task, build_tasks, is_kind
from minbert_fast.trainer.completing import task_tables
from minbert_fast.trainer.progress import file_progress

SPLITS = ("train", "dev", "test")
SHOWN_ROWS = 3  # bad rows listed per file
Rows = Mapping[str, Mapping[str, object]]  # task -> split -> rows in memory


@dataclass
class TableReader:
    """The tables of a recipe's tasks by split. Raises DataError, also when it is made, for data that do not fit."""

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

    def names(self, task: Task, split: str) -> bool:
        """Whether the task itself has data of a split: files, splits of the hub, or rows in memory."""
        return split in self.rows.get(task.name, {}) or any(source.files(split) for source in task.sources)

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
