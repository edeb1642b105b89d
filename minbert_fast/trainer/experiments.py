# SPDX-License-Identifier: Apache-2.0
"""Series of runs: one directory per run, finished runs are skipped and interrupted ones resumed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minbert_fast.common import cli
from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError, Whole, plain
from minbert_fast.common.storage import read_json
from minbert_fast.recipes.recipe import Recipe, absolute_path
from minbert_fast.tasks import build_tasks
from minbert_fast.trainer.callbacks import Callback
from minbert_fast.trainer.job import DEVICES, BackendName, Options, train
from minbert_fast.trainer.outputs import SUMMARY
from minbert_fast.trainer.resume import changed_values, positions_of


@dataclass(frozen=True)
class Trial:
    """The result of one run: its `summary.json`, or the one-line reason of its failure."""

    name: str
    directory: Path
    summary: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""

    def score(self, metric: str) -> float | None:
        """A dev metric of the best model; None if the run has none."""
        value = self.summary.get("dev", {}).get(metric)
        return None if value is None else float(value)


def run_or_resume(
    name: str,
    recipe: Recipe,
    directory: Path,
    command: str,
    device: str = "auto",
    backend: BackendName = "auto",
    callbacks: Sequence[Callback] = (),
) -> Trial:
    """Runs `recipe` in `directory`: resumes an interrupted run, and only reads the results of a finished one.

    A run that fails (its data are missing, its recipe has changed) gives a Trial with the reason, which is printed on
    standard error too. Raises RunError if a signal stopped the run.
    """
    try:
        recipe = recipe.with_paths(absolute_path)  # as the run saves it
        executed = load_executed_recipe(directory)
        if not is_finished(directory) or not same_experiment(executed, recipe, positions_of(directory)):
            again = directory.is_dir()
            named: BackendName = "fast" if backend == "auto" else backend  # not that of an interrupted run
            options = Options(directory, device, named, resume=again, command=command, callbacks=tuple(callbacks))
            train(recipe, options)
        return read_trial(name, directory, recipe, backend)
    except (ValueError, RunError) as error:
        if isinstance(error, RunError) and error.status > 128:
            raise
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return Trial(name, directory, failure=str(error))


def read_trial(name: str, directory: Path, recipe: Recipe, backend: str = "auto") -> Trial:
    """The result of the run in `directory`. Raises ConfigError if it has none, or had other data, weights or backend."""
    summary = read_json(directory / SUMMARY)
    recipe = recipe.with_paths(absolute_path)
    executed, wanted = load_executed_recipe(directory) or recipe, "reference" if backend == "reference" else "fast"
    inputs = {
        "model.name": (executed.model.name, recipe.model.name),
        "data.directory": (executed.data.directory, recipe.data.directory),
        "data.files": (plain(executed.data.files), plain(recipe.data.files)),
        "backend": (summary.get("backend", wanted), wanted),
    }
    if changed := [f"{name} was {then!r}, now {now!r}" for name, (then, now) in inputs.items() if then != now]:
        raise ConfigError(f"{directory} holds a finished run: {'; '.join(changed)}; choose another --output")
    return Trial(name, directory, summary)


def is_finished(directory: Path) -> bool:
    """Whether the run in `directory` has ended; runs of earlier versions do not say so and count as ended."""
    summary = directory / SUMMARY
    return summary.is_file() and bool(read_json(summary).get("finished", True))


def load_executed_recipe(directory: Path) -> Recipe | None:
    """The recipe of the run in `directory`, without the tasks that had no data; None without a finished run."""
    try:
        return Recipe.load(str(directory / "last" / "recipe.toml"))
    except ConfigError:
        return None


def primary_metrics(trials: Iterable[Trial], base: Recipe | None = None) -> list[str]:
    """The metrics that judge the tasks: of the first finished run, whose labels decided the kinds, else of `base`."""
    recipe = next(filter(None, (load_executed_recipe(trial.directory) for trial in trials)), base)
    return [task.primary for task in build_tasks(recipe).values() if task.predicts] if recipe else []


def same_experiment(executed: Recipe | None, recipe: Recipe, positions: int) -> bool:
    """Whether a run of `executed`, of a model with so many positions, took the steps of `recipe`.

    `read_trial` compares data and weights.
    """
    if executed is None or executed.training.max_steps != recipe.training.max_steps:
        return False
    return not changed_values(executed, recipe, positions)


def add_series_flags(command: cli.Parser, output_required: bool = True) -> None:
    """Adds the flags that `search`, `compare` and `reproduce` share; `load_recipe` reads them."""
    add = command.add_argument
    add("--data", metavar="DIR", help="data files in the course's layout")
    add("--model", metavar="DIR|HUB_NAME", help="encoder weights")
    add("--output", metavar="DIR", type=Path, required=output_required, help="a directory for all runs and the table")
    add("--max-steps", metavar="N", type=cli.whole_number, help="steps of each run, which its stages share")
    add("--device", choices=DEVICES, default="auto")
    cli.add_import_flag(command)


def load_recipe(name: str | None, chosen: argparse.Namespace) -> Recipe:
    """Recipe `name` (or a TOML file) with the data, model and step limit of the command line.

    Without a name, `default`, or the demonstration if the command line has no model.
    """
    name = name or ("default" if chosen.model else "demonstration")
    values: dict[str, Any] = {"data": {"directory": chosen.data}} if chosen.data else {}
    values |= {"model": {"name": chosen.model}} if chosen.model else {}
    values |= {"imports": Whole(chosen.imports)} if chosen.imports else {}
    values |= {} if chosen.max_steps is None else {"training": {"max_steps": chosen.max_steps}}
    return Recipe.load(name).with_values(values, "command line")
