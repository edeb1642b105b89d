# SPDX-License-Identifier: Apache-2.0
"""Series of runs: one directory per run, finished runs are skipped and interrupted ones resumed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
from minbert_fast.trainer.outputs import CHECKPOINTS, SUMMARY, RunDirectory, saved_recipe_path
from minbert_fast.trainer.resume import SHOWN_CHANGES, as_begun, changed_values, positions_of


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
        check_trial(directory, recipe, backend)
        if not _is_complete(directory, recipe):
            named: BackendName = "fast" if backend == "auto" else backend  # not that of an interrupted run
            resume = directory.is_dir()
            options = Options(
                directory, device, named, resume, command=command, callbacks=tuple(callbacks), again=command
            )
            train(recipe, options)
        return read_trial(name, directory, recipe, backend)
    except (ValueError, RunError) as error:
        if isinstance(error, RunError) and error.status > 128:
            raise
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return Trial(name, directory, failure=str(error))


def check_trial(directory: Path, recipe: Recipe, backend: str = "auto") -> None:
    """Raises ConfigError if `directory` holds a finished run of other values, data, weights or backend.

    Another length is no mistake if the run kept a checkpoint: it goes on from there.
    """
    if is_finished(directory):
        goes_on = any((directory / CHECKPOINTS).glob("step-*"))
        _refuse_other(directory, recipe, backend, any_length=goes_on)


def read_trial(name: str, directory: Path, recipe: Recipe, backend: str = "auto") -> Trial:
    """The result of the run in `directory`. Raises ConfigError if it has none, or is a run of something else."""
    summary = read_json(directory / SUMMARY)
    _refuse_other(directory, recipe, backend)
    return Trial(name, directory, summary)


def _refuse_other(directory: Path, recipe: Recipe, backend: str, any_length: bool = False) -> None:
    """Raises ConfigError, with what differs, if the run that ended in `directory` is not one of `recipe`."""
    summary = read_json(directory / SUMMARY)
    recipe = as_begun(recipe.with_paths(absolute_path), directory)  # as the run saves it
    executed, wanted = load_executed_recipe(directory) or recipe, "reference" if backend == "reference" else "fast"
    inputs: dict[str, tuple[Any, Any]] = {
        "model.name": (executed.model.name, recipe.model.name),
        "data.directory": (executed.data.directory, recipe.data.directory),
        "data.files": (plain(executed.data.files), plain(recipe.data.files)),
        "backend": (summary["backend"], wanted),
    }
    if not any_length:
        inputs["training.max_steps"] = executed.training.max_steps, recipe.training.max_steps
    changed = [f"{name} was {then!r}, now {now!r}" for name, (then, now) in inputs.items() if then != now]
    changed += changed_values(executed, recipe, positions_of(directory))
    if changed:
        shown = "; ".join(changed[:SHOWN_CHANGES])
        raise ConfigError(f"{directory} holds a finished run: {shown}; choose another --output")


def _is_complete(directory: Path, recipe: Recipe) -> bool:
    """Whether the run in `directory` has ended with this length, and its report is written."""
    executed = load_executed_recipe(directory)
    if executed is None or not is_finished(directory) or not RunDirectory(directory).report_is_current:
        return False
    return executed.training.max_steps == recipe.training.max_steps


def is_finished(directory: Path) -> bool:
    """Whether the run in `directory` has ended."""
    summary = directory / SUMMARY
    return summary.is_file() and bool(read_json(summary).get("finished"))


def load_executed_recipe(directory: Path) -> Recipe | None:
    """The recipe of the run in `directory`, without the tasks that had no data; None without a run."""
    for path in (directory / "last" / "recipe.toml", saved_recipe_path(directory)):  # `--discard` leaves the second one
        with suppress(ConfigError):
            return Recipe.load(str(path))
    return None


def primary_metrics(trials: Iterable[Trial], base: Recipe | None = None) -> list[str]:
    """The metrics that judge the tasks: of the first finished run, whose labels decided the kinds, else of `base`."""
    recipe = next(filter(None, (load_executed_recipe(trial.directory) for trial in trials)), base)
    return [task.primary for task in build_tasks(recipe).values() if task.predicts] if recipe else []


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
