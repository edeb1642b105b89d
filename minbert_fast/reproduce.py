# SPDX-License-Identifier: Apache-2.0
"""Runs published experiments again and tabulates published against measured scores.

    python -m minbert_fast.reproduce --data DIR --model DIR --output DIR                    all recipes with published scores
    python -m minbert_fast.reproduce sbert-exp1 finetune-all --data DIR --model DIR --output DIR --max-steps 200

Each recipe has a directory under --output. A second call resumes the interrupted run and skips finished ones. Without
--data and --model the recipes run on the embedded sample, which only shows that they run.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minbert_fast.common import cli
from minbert_fast.common.errors import RunError
from minbert_fast.common.storage import write_json, write_text
from minbert_fast.data.formats import FORMATS, DataError, find_tables
from minbert_fast.data.sample import sample_directory
from minbert_fast.model.config import BertConfig
from minbert_fast.model.weights import resolve
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.reporting.runs import format_score
from minbert_fast.tasks import build_tasks
from minbert_fast.trainer import experiments
from minbert_fast.trainer.experiments import Trial

METRICS = {
    "sentiment_accuracy": "sentiment",
    "paraphrase_accuracy": "paraphrase",
    "similarity_pearson": "similarity",
    "score": "score",
}


def parser() -> cli.Parser:
    """The command's flags."""
    command = cli.Parser("reproduce", __doc__ or "")
    add = command.add_argument
    add("names", nargs="*", metavar="NAME", help="recipes (default: all with published scores)")
    experiments.add_series_flags(command)
    add("--seed", metavar="N", type=cli.whole_number, help="seed of all runs (default: the recipe's)")
    add("--backend", choices=("auto", "fast", "reference"), default="auto")
    return command


def main(arguments: Sequence[str]) -> None:
    """Runs the recipes one after the other; writes table.md and table.json after each."""
    chosen = parser().parse_args(arguments)
    names = chosen.names or [name for name in recipe_names() if Recipe.load(name).published]
    seed = {} if chosen.seed is None else {"training": {"seed": chosen.seed}}
    recipes = {name: experiments.load_recipe(name, chosen).with_values(seed, "command line") for name in names}
    output: Path = chosen.output
    output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "minbert_fast.reproduce", *arguments])
    trials: list[Trial] = []
    for index, (name, recipe) in enumerate(recipes.items(), 1):
        print(f"\n== {index} of {len(recipes)}: {name}: {recipe.description}", flush=True)
        directory = output / Path(name).stem
        trials.append(experiments.run_or_resume(name, recipe, directory, command, chosen.device, chosen.backend))
        below = "\n\n".join(notes(recipes, trials, chosen.model, chosen.data))
        write_text(output / "table.md", f"{score_table(recipes, trials)}\n{below}\n")
        write_json(output / "table.json", [record(recipes[trial.name], trial) for trial in trials])
    print("\n" + (output / "table.md").read_text(encoding="utf-8"), end="")
    failed = [trial.name for trial in trials if trial.failure]
    if failed:
        raise RunError(f"{len(failed)} of {len(trials)} recipes did not run: {', '.join(failed)}")


def record(recipe: Recipe, trial: Trial) -> dict[str, Any]:
    """One recipe's entry in table.json."""
    facts = ("steps", "seconds", "tokens", "device", "precision", "commit")
    return {
        "recipe": trial.name,
        "source": recipe.source,
        "published": dict(recipe.published),
        "measured": {metric: trial.score(metric) for metric in METRICS},
        **{key: trial.summary.get(key) for key in facts},
        "without": dropped_tasks(recipe, trial),
        "failure": trial.failure,
    }


def dropped_tasks(recipe: Recipe, trial: Trial) -> list[str]:
    """Tasks of the recipe that the run dropped because it had no data for them."""
    executed = experiments.load_executed_recipe(trial.directory) if trial.summary else None
    return [] if executed is None else [name for name in build_tasks(recipe) if name not in build_tasks(executed)]


def score_table(recipes: dict[str, Recipe], trials: Sequence[Trial]) -> str:
    """Published against measured scores, in Markdown."""
    rows = []
    for trial in trials:
        scores = ((recipes[trial.name].published.get(metric), trial.score(metric)) for metric in METRICS)
        steps = f"{trial.summary['steps']:,}" if trial.summary else "failed"
        rows.append([trial.name, *(format_score(score, 3) for pair in scores for score in pair), steps])
    head = ["recipe", *(f"{name}, {kind}" for name in METRICS.values() for kind in ("published", "measured")), "steps"]
    return experiments.markdown_table(head, rows)


def notes(recipes: dict[str, Recipe], trials: Sequence[Trial], model: str | None, data: str | None) -> list[str]:
    """The paragraphs below the table: weights, data, devices, and the tasks that runs dropped."""
    weights = "the embedded tiny model, random weights (a demonstration)"
    if model:
        config = resolve(model) / "config.json"
        shape = BertConfig.from_file(config) if config.is_file() else None
        size = f", {shape.num_hidden_layers} layers of {shape.hidden_size}" if shape else ""
        weights = f"{Path(model).name}{size}"
    files = []
    folder = Path(data) if data else sample_directory().data
    for split in ("train", "dev"):
        with suppress(DataError):
            found = find_tables(folder, split, tuple(FORMATS)).paths
            files.append(f"{split}: {', '.join(f'{path.name} {count_lines(path) - 1:,}' for path in found.values())}")
    lines = [f"Weights: {weights}.", f"Data: {folder.name}. Rows of {'; '.join(files)}."]
    places = {(s["device"], s["precision"], s["backend"], s["commit"]) for t in trials if (s := t.summary)}
    lines += [
        f"Run on {device}, {precision}, {backend} backend{f', commit {commit[:10]}' if commit else ''}."
        for device, precision, backend, commit in sorted(places, key=str)
    ]
    lines.append(
        "Published scores are the reports' own, with BERT-base on the whole course data; some are on the test set."
    )
    without = {trial.name: dropped_tasks(recipes[trial.name], trial) for trial in trials}
    return lines + [f"{name} ran without {', '.join(tasks)}: no data." for name, tasks in without.items() if tasks]


def count_lines(path: Path) -> int:
    """The number of lines of a file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


if __name__ == "__main__":
    sys.exit(cli.run(main))
