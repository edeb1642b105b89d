# SPDX-License-Identifier: Apache-2.0
"""Searches for the best values of a recipe.

    python -m minbert_fast.search --recipe NAME --data DIR --output DIR --grid lr=1e-5,2e-5 --grid dropout=0.1,0.3
    ... --random 10        ten random combinations of the grid
    ... --optuna 10        ten combinations that Optuna proposes (pip install 'minbert-fast[optuna]')
    ... --range lr=1e-5..1e-4 --optuna 10    numbers of a range; a range over a factor of ten is drawn by its logarithm

KEY is a flag of `train` (lr, dropout, batch-size, surgery, ...) or a key of the recipe (optimizer.layer_decay).
Optuna ends a run whose dev score is below the median of earlier ones at the same step. Its study is in optuna.db.
Each combination has a directory under --output; a second call continues the search. Results: table.md, table.json,
report.html and plots/.
"""

from __future__ import annotations

import itertools
import random
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minbert_fast import surgery
from minbert_fast.common import cli
from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_json, write_text
from minbert_fast.recipes.recipe import Recipe, parse_assignments
from minbert_fast.reporting.markdown import aligned_table
from minbert_fast.reporting.runs import format_score
from minbert_fast.reporting.search_page import write_search
from minbert_fast.tasks.metrics import lower_is_better
from minbert_fast.train import RECIPE_FLAGS
from minbert_fast.trainer import experiments
from minbert_fast.trainer.callbacks import Callback, EvaluationEvent
from minbert_fast.trainer.experiments import Trial
from minbert_fast.trainer.outputs import lock_directory
from minbert_fast.trainer.study import Range, Space, Values, parse_range, run_study

# One value may hold commas in brackets: [0.9, 0.98] or torchjd:CAGrad(c=0.4, norm_eps=0.1).
_VALUE = re.compile(r"(?:\[[^\]]*\]|\([^)]*\)|[^,])+")
SHORT = {name.removeprefix("--"): flag.key for flag in RECIPE_FLAGS for name in (flag.name, *flag.also)}


class _StopWithoutMetric(Callback):
    """Ends a run at its first evaluation, the one before the first step, if it lacks the metric that counts."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.known: list[str] = []  # the metrics of a run that was ended

    def on_evaluation(self, event: EvaluationEvent) -> bool:
        missing = self.metric not in event.metrics
        self.known = list(event.metrics) if missing else []
        return missing


def parser() -> cli.Parser:
    command = cli.Parser("search", __doc__ or "")
    add = command.add_argument
    add("--recipe", metavar="NAME|FILE.toml", help="(default: default; without --model: demonstration)")
    add("--grid", metavar="KEY=A,B,...", action="append", default=[], help="(repeatable)")
    needs = "needs --optuna (repeatable)"
    add("--range", metavar="KEY=LOW..HIGH", action="append", default=[], dest="ranges", help=needs)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--random", metavar="N", type=cli.positive_number, help="run N random combinations")
    how.add_argument("--optuna", metavar="N", type=cli.positive_number, help="run N combinations that Optuna proposes")
    add("--metric", default="score", help="the dev metric that counts (default: score)")
    experiments.add_series_flags(command)
    add("--seed", metavar="N", type=cli.whole_number, help="seed of --random and --optuna (default: 0)")
    return command


def main(arguments: Sequence[str]) -> None:
    """Runs the combinations and updates the results after each."""
    chosen = parser().parse_args(arguments)
    grid, ranges = parse_grid(chosen.grid), parse_ranges(chosen.ranges)
    for key in grid.keys() & ranges.keys():
        raise ConfigError(f"--grid and --range {key}: choose one")
    space: dict[str, Sequence[str] | Range] = {**grid, **ranges}
    if not space:
        raise ConfigError("expected --grid KEY=A,B,... or --range KEY=LOW..HIGH")
    if chosen.ranges and chosen.optuna is None:
        raise ConfigError(f"--range {chosen.ranges[0]}: --optuna N says how many values to try")
    if chosen.seed is not None and not (chosen.random or chosen.optuna):
        raise ConfigError(
            f"--seed {chosen.seed}: needs --random or --optuna; the seed of the runs is --grid seed=A,B,..."
        )
    base = experiments.load_recipe(chosen.recipe, chosen)
    ends = {key: str(limits).split("..") for key, limits in ranges.items()}
    for combination in combinations(grid | ends):  # finds invalid values before the first run
        with_combination(base, combination)
    output: Path = chosen.output
    planned = sample_combinations(combinations(grid), chosen.random, chosen.seed or 0)
    for combination in planned if chosen.optuna is None else ():  # finds runs of something else, likewise
        experiments.check_trial(output / directory_name(combination), with_combination(base, combination))
    command = shlex.join(["python", "-m", "minbert_fast.search", *arguments])
    trials: dict[str, tuple[Values, Trial]] = {}
    known_metric = _StopWithoutMetric(chosen.metric)

    def run_trial(combination: Values, callbacks: Sequence[Callback] = ()) -> Trial:
        name = directory_name(combination)
        if name not in trials:
            print(f"\n== {len(trials) + 1}: {name}", flush=True)
            recipe = with_combination(base, combination)
            trial = experiments.run_or_resume(
                name, recipe, output / name, command, chosen.device, callbacks=[known_metric, *callbacks]
            )
            known = known_metric.known or list(trial.summary.get("dev", {}))
            if known and chosen.metric not in known:
                raise ConfigError(f"--metric {chosen.metric}: no such dev metric; known: {', '.join(known)}")
            add_trial(combination, trial)
        return trials[name][1]

    def add_trial(combination: Values, trial: Trial) -> None:
        trials[trial.name] = combination, trial
        write_results(output, space, list(trials.values()), chosen.metric)

    def read_trial(combination: Values) -> None:
        name = directory_name(combination)
        add_trial(combination, experiments.read_trial(name, output / name, with_combination(base, combination)))

    with lock_directory(output):
        if chosen.optuna is not None:
            run_study(output, space, chosen.metric, chosen.optuna, chosen.seed or 0, run_trial, read_trial)
        else:
            for combination in planned:
                run_trial(combination)
    print("\n" + (output / "table.md").read_text(encoding="utf-8"), end="")
    failed = [name for name, (_, trial) in trials.items() if trial.failure]
    if failed:
        raise RunError(f"{len(failed)} of {len(trials)} combinations failed: {'; '.join(failed)}")


def parse_grid(assignments: Sequence[str]) -> dict[str, list[str]]:
    """The lists of values in `KEY=A,B` by key of the recipe. Raises ConfigError."""
    grid: dict[str, list[str]] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        options = [option.strip() for option in _VALUE.findall(text) if option.strip()]
        key = SHORT.get(key.strip(), key.strip())
        if not equals or not options or "." not in key:
            raise ConfigError(f"--grid {assignment!r}: expected KEY=A,B,... with a key such as lr or optimizer.lr")
        grid.setdefault(key, []).extend(options)
    return grid


def parse_ranges(assignments: Sequence[str]) -> dict[str, Range]:
    """The ranges in `KEY=LOW..HIGH` by key of the recipe. Raises ConfigError."""
    ranges: dict[str, Range] = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        key = SHORT.get(key.strip(), key.strip())
        if key in ranges:
            raise ConfigError(f"--range {key}: given twice")
        try:
            ranges[key] = parse_range(text)
        except ValueError:
            raise ConfigError(f"--range {assignment!r}: expected KEY=LOW..HIGH, such as lr=1e-5..1e-4") from None
    return ranges


def combinations(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations; the last key changes fastest."""
    return [dict(zip(grid, options, strict=True)) for options in itertools.product(*grid.values())]


def sample_combinations(every: list[dict[str, str]], count: int | None, seed: int) -> list[dict[str, str]]:
    """`count` different combinations drawn with `seed`; all of them if there are no more, or if `count` is None."""
    return every if count is None or count >= len(every) else random.Random(seed).sample(every, count)


def with_combination(base: Recipe, combination: Values) -> Recipe:
    """The recipe with a combination's values. Raises ConfigError for invalid ones."""
    recipe = base.with_values(parse_assignments(f"{key}={value}" for key, value in combination.items()), "--grid")
    try:
        surgery.weights(recipe.surgery.method, recipe.surgery.reduction)
    except ValueError as error:
        raise ConfigError(f"--grid: {error}") from None
    return recipe


def directory_name(combination: Values) -> str:
    """The name of a combination's directory, which lists its values."""
    parts = (f"{key.rpartition('.')[2]}={value}" for key, value in combination.items())
    return ",".join("".join(c if c.isalnum() or c in "=,.-_+" else "_" for c in part) for part in parts)


def write_results(output: Path, space: Space, trials: Sequence[tuple[Values, Trial]], metric: str) -> None:
    """Writes table.md and table.json, best trials first, report.html and plots/."""
    sign = 1 if lower_is_better(metric) else -1
    ranked = sorted(trials, key=lambda pair: np.inf if (score := pair[1].score(metric)) is None else sign * score)
    metrics = dict.fromkeys((metric, *experiments.primary_metrics(trial for _, trial in trials)))
    rows = [
        [
            *values.values(),
            *(format_score(trial.score(m), 3) for m in metrics),
            f"{trial.summary.get('steps', 'failed')}{'' if trial.summary.get('finished', True) else ' (pruned)'}",
        ]
        for values, trial in ranked
    ]
    reasons = "".join(f"\n{trial.name}: {trial.failure}\n" for _, trial in ranked if trial.failure)
    write_text(output / "table.md", aligned_table([*space, *metrics, "steps"], rows) + reasons)
    found = [
        {"values": dict(v), "dev": t.summary.get("dev", {}), "failure": t.failure, "metric": metric} for v, t in ranked
    ]
    write_json(output / "table.json", found)
    write_search(output)


if __name__ == "__main__":
    sys.exit(cli.run(main))
