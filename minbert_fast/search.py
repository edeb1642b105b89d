# SPDX-License-Identifier: Apache-2.0
"""Searches over values of a recipe.

    python -m minbert_fast.search --recipe NAME --data DIR --output DIR --grid lr=1e-5,2e-5 --grid dropout=0.1,0.3
    ... --random 10        ten combinations of the grid, drawn at random
    ... --optuna 10        ten combinations that Optuna proposes (pip install 'minbert_fast[optuna]')

Names are the flags of `train` (lr, dropout, batch-size, surgery, ...) or keys of the recipe (optimizer.layer_decay). Each
combination has a directory under --output; called again, the search goes on where it was stopped. At the end: table.md,
table.json and plot.svg.
"""

from __future__ import annotations

import itertools
import random
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common import cli
from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_bytes, write_json
from minbert_fast.recipes.recipe import Recipe, parse_assignments
from minbert_fast.reporting import charts
from minbert_fast.train import RECIPE_FLAGS
from minbert_fast.trainer.experiments import Place, Trial, limited, markdown, run_or_resume, shown

Values = Mapping[str, str]  # key of the recipe -> value as written
SHORT = {name.removeprefix("--"): flag.key for flag in RECIPE_FLAGS for name in flag.names}


def parser() -> cli.Parser:
    """The command line."""
    command = cli.Parser("search", __doc__ or "")
    command.add_argument(
        "--recipe", metavar="NAME|FILE.toml", help="(default: default; without --model: demonstration)"
    )
    command.add_argument("--grid", metavar="KEY=A,B,...", action="append", default=[], required=True)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--random", metavar="N", type=cli.whole_number, help="so many combinations, drawn at random")
    how.add_argument("--optuna", metavar="N", type=cli.whole_number, help="so many combinations, proposed by Optuna")
    command.add_argument("--metric", default="score", help="dev metric to make large (default: score)")
    command.add_argument("--data", metavar="DIR", help="data files in the course's layout")
    command.add_argument("--model", metavar="DIR|HUB_NAME", help="encoder weights")
    command.add_argument("--output", metavar="DIR", required=True, help="a directory for all runs and the table")
    command.add_argument(
        "--max-steps", metavar="N", type=cli.whole_number, help="steps a run, or a stage of it, at most"
    )
    command.add_argument(
        "--seed", metavar="N", type=cli.whole_number, default=0, help="of the search itself (default: 0)"
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return command


def main(arguments: Sequence[str]) -> None:
    """Runs the combinations and writes the table after each."""
    chosen = parser().parse_args(arguments)
    grid = parse_grid(chosen.grid)
    base = Recipe.load(chosen.recipe or ("default" if chosen.model else "demonstration"))
    values: dict[str, Any] = {"data": {}, "model": {}}
    if chosen.data:
        values["data"]["directory"] = chosen.data
    if chosen.model:
        values["model"]["name"] = chosen.model
    base = limited(base.with_values(values, "command line"), chosen.max_steps)
    for combination in combinations(grid):  # a mistake in any of them is found before the first step
        recipe_of(base, combination)
    output = Path(chosen.output)
    output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "minbert_fast.search", *arguments])
    place = Place(chosen.device)
    trials: dict[str, tuple[Values, Trial]] = {}

    def attempt(combination: Values) -> float | None:
        name = name_of(combination)
        if name not in trials:
            print(f"\n== {len(trials) + 1}: {name}", flush=True)
            trial = run_or_resume(name, recipe_of(base, combination), output / name, place, command)
            if trial.failure:
                print(f"{name}: {trial.failure}", file=sys.stderr, flush=True)
            dev = (trial.summary or {}).get("dev")
            if dev and chosen.metric not in dev:
                raise ConfigError(f"--metric {chosen.metric}: no such dev metric; known: {', '.join(dev)}")
            trials[name] = combination, trial
            write_results(output, grid, list(trials.values()), chosen.metric)
        return trials[name][1].score(chosen.metric)

    if chosen.optuna is not None:
        propose(attempt, grid, chosen.optuna, chosen.seed)
    else:
        for combination in drawn(combinations(grid), chosen.random, chosen.seed):
            attempt(combination)
    print("\n" + (output / "table.md").read_text(encoding="utf-8"), end="")
    if all(trial.failure for _, trial in trials.values()):
        raise RunError("no combination ran")


def parse_grid(assignments: Sequence[str]) -> dict[str, list[str]]:
    """`KEY=A,B` as lists of values by the recipe's key. Raises ConfigError."""
    grid: dict[str, list[str]] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        options = [option.strip() for option in text.split(",") if option.strip()]
        key = SHORT.get(key.strip(), key.strip())
        if not equals or not options or "." not in key:
            raise ConfigError(f"--grid {assignment!r}: expected KEY=A,B,... with a key such as lr or optimizer.lr")
        grid[key] = options
    return grid


def combinations(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination, the last key changing fastest."""
    return [dict(zip(grid, options, strict=True)) for options in itertools.product(*grid.values())]


def drawn(every: list[dict[str, str]], count: int | None, seed: int) -> list[dict[str, str]]:
    """All of them, or `count` different ones at random, always the same for a seed."""
    return every if count is None or count >= len(every) else random.Random(seed).sample(every, count)


def recipe_of(base: Recipe, combination: Values) -> Recipe:
    """The recipe with a combination's values. Raises ConfigError for one that it refuses."""
    return base.with_values(parse_assignments(f"{key}={value}" for key, value in combination.items()), "--grid")


def name_of(combination: Values) -> str:
    """A directory's name that says which combination it holds."""
    parts = (f"{key.rpartition('.')[2]}={value}" for key, value in combination.items())
    return ",".join("".join(c if c.isalnum() or c in "=,.-_+" else "_" for c in part) for part in parts)


def propose(attempt: Callable[[Values], float | None], grid: Mapping[str, list[str]], count: int, seed: int) -> None:
    """`count` trials that Optuna's TPE sampler proposes; earlier ones are repeated from their directories."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("--optuna needs Optuna: pip install 'minbert_fast[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))

    def objective(trial: Any) -> float:
        found = attempt({key: trial.suggest_categorical(key, options) for key, options in grid.items()})
        if found is None:
            raise optuna.TrialPruned
        return found

    study.optimize(objective, n_trials=count)


def write_results(
    output: Path, grid: Mapping[str, Sequence[str]], trials: Sequence[tuple[Values, Trial]], metric: str
) -> None:
    """table.md, table.json and plot.svg, the best first."""
    ranked = sorted(trials, key=lambda pair: -(score if (score := pair[1].score(metric)) is not None else -np.inf))
    others = ("sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson")
    metrics = (metric, *(other for other in others if other != metric))
    rows = [
        [*values.values(), *(shown(trial.score(m)) for m in metrics), str((trial.summary or {}).get("steps", "failed"))]
        for values, trial in ranked
    ]
    write_bytes(output / "table.md", markdown([*grid, *metrics, "steps"], rows).encode())
    write_json(
        output / "table.json",
        [
            {"values": dict(values), "dev": (trial.summary or {}).get("dev", {}), "failure": trial.failure}
            for values, trial in ranked
        ],
    )
    write_bytes(output / "plot.svg", charts.standalone(plot(grid, trials, metric)).encode())


def plot(grid: Mapping[str, Sequence[str]], trials: Sequence[tuple[Values, Trial]], metric: str) -> str:
    """The best score reached with each value of each key, a line a key, over the value's place in its list."""
    series = []
    for key, options in grid.items():
        best = [
            max(
                (s for values, t in trials if values[key] == option and (s := t.score(metric)) is not None),
                default=np.nan,
            )
            for option in options
        ]
        name = f"{key}: {', '.join(options)}"
        series.append(charts.Series(name, np.arange(1, len(options) + 1), np.array(best), marked=True))
    return charts.lines(f"best {metric} by value", series, "place of the value in its list")


if __name__ == "__main__":
    sys.exit(cli.run(main))
