# SPDX-License-Identifier: Apache-2.0
"""`fit`: training from Python, on files or on rows in memory. `python -m minbert_fast.train` runs the same job.

from minbert_fast import fit

result = fit(data=frame, text="review", label="stars", model="bert-base-uncased", output="runs/stars")
result.metrics["stars_accuracy"], result.predictor.predict("stars", ["A gripping film."])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minbert_fast.common.schema import ConfigError, merge, plain
from minbert_fast.common.storage import read_json
from minbert_fast.data.source import Names
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks.inference.predictor import Predictor
from minbert_fast.trainer.callbacks import Callback
from minbert_fast.trainer.job import BackendName, Options, train
from minbert_fast.trainer.outputs import SUMMARY
from minbert_fast.trainer.table_reader import SPLITS


@dataclass(frozen=True, repr=False)
class FitResult:
    """A finished run."""

    output: Path  # the run's directory

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return dict(read_json(self.output / SUMMARY))

    @property
    def metrics(self) -> dict[str, float | None]:
        """Dev scores of the best model; empty without dev rows."""
        return dict(self.summary["dev"])

    @cached_property
    def predictor(self) -> Predictor:
        """The best model, on the device and in the precision of the run."""
        summary = self.summary
        return Predictor.from_pretrained(self.output / "best", device=summary["device"], precision=summary["precision"])

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items() if value is not None)
        return f"FitResult({str(self.output)!r}: {self.summary['steps']:,} steps{', ' if scores else ''}{scores})"


def fit(
    recipe: Recipe | str | Mapping[str, Any] = "default",
    *,
    data: Any = None,
    text: Names = (),
    label: Names = "",
    kind: str = "",
    model: str | Path | None = None,
    output: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    device: str = "auto",
    backend: BackendName = "auto",
    resume: bool = False,
    overwrite: bool = False,
    report_to: Sequence[str] = (),
) -> FitResult:
    """Trains a recipe and returns the finished run.

    recipe: a Recipe, the name of one, a .toml file, or values to lay over `default`, nested as in a file.
    data: a directory in the course's layout; or one task's rows: a file, a list of dicts or tuples, a dict of columns, a
        pandas or `datasets` table; or a mapping from the names of tasks to either such rows or to
        `{"train": rows, "dev": rows, "text": columns, "label": column, ...}` (keys of `minbert_fast.data.source.Source`).
    text, label, kind: of the single task whose rows `data` is; the task is called after its label column.
    model: a directory or a hub name; None: that of the recipe.
    output: the run's directory; None: a new one under runs/.

    Rows in memory are not saved: to resume such a run, pass equal rows again. Raises ConfigError or DataError for a
    mistake in the arguments or the data, RunError for a run that had to stop.
    """
    if isinstance(recipe, Mapping):
        recipe = Recipe.load("default").with_values(recipe, "recipe")
    elif isinstance(recipe, str):
        recipe = Recipe.load(recipe)
    if model is not None:
        recipe = replace(recipe, model=replace(recipe.model, name=str(model)))
    rows: dict[str, dict[str, object]] = {}
    if text or label or kind:
        if data is None:
            raise ConfigError("text, label and kind describe `data`: give the rows of the task as data")
        name = task_name(label) if isinstance(label, str) and label else "text"
        data = {name: {"train": data, "text": text, "label": label, "kind": kind}}
    if isinstance(data, str | Path) and Path(data).is_dir():
        recipe = replace(recipe, data=replace(recipe.data, directory=str(data)))
    elif data is not None:
        recipe, rows = with_data(recipe, data)
    options = Options(
        output=None if output is None else Path(output),
        device=device,
        backend=backend,
        resume=resume,
        overwrite=overwrite,
        report_to=tuple(report_to),
        rows=rows,
        callbacks=tuple(callbacks),
    )
    return FitResult(train(recipe, options))


def task_name(column: str) -> str:
    """The name of a task whose label is `column`: letters, digits, "-" and "_" alone."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", column).strip("-") or "task"


def with_data(recipe: Recipe, data: Any) -> tuple[Recipe, dict[str, dict[str, object]]]:
    """The recipe with the tasks of `data` (see `fit`) alone, and their rows in memory by task and split.

    A task that the recipe has keeps its options there. Raises ConfigError.
    """
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        found = type(data).__name__
        if isinstance(data, str | Path):
            found = f"{data}: {'a file' if Path(data).is_file() else 'no such directory'}"
        expected = "a directory, a mapping from tasks to rows, or rows with text and label"
        raise ConfigError(f"data: expected {expected} ({found})")
    tasks: dict[str, Any] = {}
    rows: dict[str, dict[str, object]] = {}
    for name, value in data.items():
        described = isinstance(value, Mapping) and not value.keys().isdisjoint((*SPLITS, "hub"))
        table = dict(value) if described else {"train": value}
        own = {"kind": table.pop("kind")} if "kind" in table else {}
        for split in SPLITS:
            if split in table and not _names_files(table[split]):
                rows.setdefault(name, {})[split] = table.pop(split)
        source = {key: each for key, each in table.items() if each not in ("", ())}
        tasks[name] = merge(recipe.tasks.get(name, {}), own) | {"data": plain(source)}
    return replace(recipe, tasks=tasks), rows


def _names_files(value: object) -> bool:
    """Whether a split is one file or several, not rows."""
    files = value if isinstance(value, list | tuple) else [value]
    return bool(files) and all(isinstance(each, str | Path) for each in files)
