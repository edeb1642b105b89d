# SPDX-License-Identifier: Apache-2.0
"""What each choice in recipe `best` is worth, on a tenth of the training files that the runs do not see; dev is not touched.

    python -m benchmarks.ablation --data DIR --model DIR --output DIR [--seeds 1 2 3] [--json FILE]

One epoch a variant and seed, two for those that say so. Called again, it goes on where it was stopped. Writes the scores
of every run to the file, and prints the table of means.
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import harness
from minbert_fast.common.schema import merge
from minbert_fast.common.storage import write_json
from minbert_fast.data.formats import find_tables
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import build_tasks
from minbert_fast.trainer.experiments import Place, Trial, markdown, run_or_resume

SHARE = 10  # one row of so many is held out
SEED = 7  # of the split
METRICS = ("sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson", "score")
HEAD = ("one epoch where not said", "sentiment", "paraphrase", "similarity", "score")

BEST = Recipe.load("best")
REVIEWS = "cfimdb"  # the task that only some of the variants have


def _of_best(*options: str) -> dict[str, Any]:
    """Those options of each task that `best` sets."""
    return {name: {key: task[key] for key in options if key in task} for name, task in BEST.tasks.items()}


# Values over those of `best`, without its fourth task. R-Drop is measured on top of the second; the others build on each
# other.
PLAIN: Mapping[str, Any] = {
    "training": {"epochs": 1},
    "regularisation": {"r_drop": 0.0},
    "tasks": {
        "sentiment": {"batch_size": 32, "weight": 1.0},
        "paraphrase": {"batch_size": 32, "weight": 1.0, "encoder": "bi"},
        "similarity": {"batch_size": 32, "weight": 1.0, "encoder": "bi"},
    },
}
CROSS = {"paraphrase": {"encoder": "cross"}}
JOINT = {**CROSS, "similarity": {"encoder": "both"}}
EVEN = merge({REVIEWS: BEST.tasks[REVIEWS]}, _of_best("encoder", "batch_size"))
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "embeddings alone": {},
    "+ questions read as one sequence": {"tasks": CROSS},
    "+ similarity read both ways": {"tasks": JOINT},
    "+ film reviews as a fourth task": {"tasks": {**JOINT, REVIEWS: {**BEST.tasks[REVIEWS], "batch_size": 8}}},
    "+ two epochs, each set drawn about as often": {"training": {"epochs": 2}, "tasks": EVEN},
    "+ losses weighted": {"training": {"epochs": 2}, "tasks": merge(EVEN, _of_best("weight"))},
    "questions read as one sequence, R-Drop": {"tasks": CROSS, "regularisation": {"r_drop": 1.0}},
}


def recipe_of(variant: str, seed: int, data: Path, model: Path | None) -> Recipe:
    """What a variant trains."""
    where: dict[str, Any] = {"data": {"directory": str(data)}, "model": {"name": str(model)} if model else {}}
    training = {"seed": seed, "evaluate_untrained": False}
    tasks = {name: options for name, options in BEST.tasks.items() if name != REVIEWS}
    recipe = replace(BEST, tasks=tasks).with_values({**where, "training": training}, "ablation")
    return recipe.with_values(PLAIN, "ablation").with_values(VARIANTS[variant], variant)


def hold_out(data: Path, folder: Path) -> None:
    """Copies the training files of `data`, each split at random: nine tenths to train on, one to judge by."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = tuple(task.dataset for task in build_tasks(BEST).values())
    for path in find_tables(data, "train", datasets).paths.values():
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file, delimiter="\t")
        order = list(range(len(rows)))
        random.Random(SEED).shuffle(order)
        count = len(rows) // SHARE
        for split, chosen in (("dev", order[:count]), ("train", order[count:])):
            with (folder / path.name.replace("train", split)).open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerows([head, *(rows[i] for i in sorted(chosen))])


def record(variant: str, seed: int, trial: Trial) -> dict[str, Any]:
    """A run's scores, and what they were had with."""
    facts = ("steps", "tokens", "seconds", "precision", "device", "commit")
    summary = trial.summary or {}
    return {"variant": variant, "seed": seed, "scores": {metric: trial.score(metric) for metric in METRICS}} | {
        key: summary.get(key) for key in facts
    }


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """Means over seeds and, after the plus-minus sign, standard deviations, in Markdown."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for result in results:
        found.setdefault(result["variant"], []).append(result["scores"])
    rows = []
    for variant, scores in found.items():
        columns = [[float(each[metric]) for each in scores] for metric in METRICS]
        cells = [f"{statistics.mean(c):.3f}" + (f" ± {statistics.stdev(c):.3f}" if len(c) > 1 else "") for c in columns]
        rows.append((f"{variant} ({len(scores)} {'seed' if len(scores) == 1 else 'seeds'})", *cells))
    return markdown(HEAD, rows)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=Path, required=True, help="data files in the course's layout")
    parser.add_argument("--model", type=Path, help="encoder weights (default: the embedded tiny model)")
    parser.add_argument("--output", type=Path, required=True, help="a directory for the split and all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path, help="also write the scores of every run to this file")
    options = parser.parse_args(arguments)
    split = options.output / "data"
    if not split.exists():
        hold_out(options.data, split)
    results = []
    for seed in options.seeds:
        for index, variant in enumerate(VARIANTS):
            print(f"\n== {variant}, seed {seed}", flush=True)
            recipe = recipe_of(variant, seed, split, options.model)
            trial = run_or_resume(variant, recipe, options.output / f"{index}-{seed}", Place(), "benchmarks.ablation")
            if trial.failure:
                print(trial.failure, file=sys.stderr)
                return 1
            results.append(record(variant, seed, trial))
            if options.json:
                write_json(options.json, {"processor": harness.processor(), "runs": results})
    print("\n" + table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
