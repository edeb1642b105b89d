# SPDX-License-Identifier: Apache-2.0
"""Runs published experiments again and tabulates published beside measured scores.

    python -m minbert_fast.reproduce --list                                                 the published rows
    python -m minbert_fast.reproduce --data DIR --model DIR --output DIR                    all of them
    python -m minbert_fast.reproduce finetune 'sbert-exp*' siamese --data DIR --model DIR --output DIR --epochs-scale 0.2

A name selects a recipe, a report (the first word of its recipes' names) or, as a pattern, several recipes. Each recipe has
a directory under --output. results.json there collects the rows of all calls: a second call resumes the interrupted run and
skips finished rows. Without --data and --model the recipes run on the embedded sample, which only shows that they run.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from minbert_fast.common import cli
from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_text
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting import published
from minbert_fast.trainer import experiments, reproduction
from minbert_fast.trainer.job import BACKENDS
from minbert_fast.trainer.outputs import lock_directory


def factor(text: str) -> float:
    """The type of --epochs-scale. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def parser() -> cli.Parser:
    command = cli.Parser("reproduce", __doc__ or "")
    add = command.add_argument
    add("names", nargs="*", metavar="NAME", help="recipes, reports or patterns (default: all with published scores)")
    add("--list", action="store_true", help="show the rows and their published scores, run nothing")
    experiments.add_series_flags(command, output_required=False)
    add("--epochs-scale", metavar="F", type=factor, default=1.0, help="F times the epochs of each stage (default: 1)")
    add("--results", metavar="FILE", type=Path, help="the file of finished rows (default: results.json under --output)")
    add("--discard", action="store_true", help="remove the models and checkpoints of finished rows")
    add("--seed", metavar="N", type=cli.whole_number, help="seed of all runs (default: the recipe's)")
    add("--backend", choices=BACKENDS, default="auto")
    return command


def main(arguments: Sequence[str]) -> None:
    """Runs the recipes one after the other; writes the results file and table.md after each."""
    chosen = parser().parse_args(arguments)
    names = reproduction.select_names(chosen.names)
    if chosen.list:
        print(published.listing(names))
        return
    if chosen.output is None:
        raise ConfigError("--output DIR is missing: a directory for all runs and the table (--list runs nothing)")
    seed = {} if chosen.seed is None else {"training": {"seed": chosen.seed}}
    recipes = {}
    for name in names:
        scaled = reproduction.scale_epochs(experiments.load_recipe(name, chosen), chosen.epochs_scale)
        recipes[name] = scaled.with_values(seed, "command line")
    output: Path = chosen.output
    with lock_directory(output):
        failed = run_recipes(recipes, chosen, shlex.join(["python", "-m", "minbert_fast.reproduce", *arguments]))
    print("\n" + (output / "table.md").read_text(encoding="utf-8"), end="")
    if failed:
        raise RunError(f"{len(failed)} of {len(names)} recipes did not run: {', '.join(failed)}")


def run_recipes(recipes: Mapping[str, Recipe], chosen: argparse.Namespace, command: str) -> list[str]:
    """Runs the recipes that have no finished row; returns the names of those that failed."""
    output: Path = chosen.output
    results: Path = chosen.results or output / "results.json"
    rows = reproduction.read_rows(results)
    failed = []
    for index, (name, recipe) in enumerate(recipes.items(), 1):
        print(f"\n== {index} of {len(recipes)}: {name}: {recipe.description}", flush=True)
        scale = "" if chosen.epochs_scale == 1 else f"-epochs-{chosen.epochs_scale:g}"  # a directory per length
        directory = output / f"{Path(name).stem}{scale}"
        done = rows.get(name)
        if done and not done["failure"] and done["fingerprint"] == reproduction.fingerprint(recipe, chosen.backend):
            print(f"finished before, in {results}", flush=True)
            if chosen.discard:
                reproduction.discard_models(directory)
            continue
        trial = experiments.run_or_resume(name, recipe, directory, command, chosen.device, chosen.backend)
        if trial.failure:
            failed.append(name)
            if done and not done["failure"]:  # its scores under other conditions stay
                continue
        rows[name] = reproduction.make_row(name, recipe, trial, chosen.backend, chosen.epochs_scale)
        reproduction.write_rows(results, rows)
        write_text(output / "table.md", published.page(rows))  # now: a later run may be interrupted
        if chosen.discard and not trial.failure:
            reproduction.discard_models(directory)
    write_text(output / "table.md", published.page(rows))
    return failed


if __name__ == "__main__":
    sys.exit(cli.run(main))
