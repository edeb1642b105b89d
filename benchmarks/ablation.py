# SPDX-License-Identifier: Apache-2.0
"""Measures what each choice in recipe `best` contributes, on a held-out tenth of the training files; dev is not used.

    python -m benchmarks.ablation [parts|ideas|screen] --data DIR --model DIR --output DIR [--seeds 1 2 3] [--json FILE]

`parts` builds the recipe up choice by choice; each variant trains for one epoch per seed, or two if its name says so.
`ideas` changes one thing of the whole recipe at a time. `screen` tries seven ideas in eight runs, several in each, and then
seven others. It gives the effect of each idea: the mean of the four runs with it less the mean of the four without. A
second call continues the series. Writes the scores of every run to the JSON file and prints a table.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from benchmarks import harness
from minbert_fast.common.schema import merge
from minbert_fast.common.storage import write_json
from minbert_fast.data.formats import find_tables
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.markdown import aligned_table
from minbert_fast.tasks import build_tasks
from minbert_fast.trainer.experiments import Trial, run_or_resume

HELD_OUT = 10  # one row in ten
SPLIT_SEED = 7
METRICS = ("sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson", "score")
COLUMNS = ("sentiment", "paraphrase", "similarity", "score")

BEST = Recipe.load("best")
REVIEWS = "cfimdb"  # a task of some variants only


def _task_options(*options: str) -> dict[str, Any]:
    """The values of these options in the tasks of `best`, where it sets them."""
    return {name: {key: task[key] for key in options if key in task} for name, task in BEST.tasks.items()}


# The common start of all variants: `best` without its fourth task and with these values. Each variant below adds to the
# one before it, except the last, which adds R-Drop to the second.
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
EVEN = merge({REVIEWS: BEST.tasks[REVIEWS]}, _task_options("encoder", "batch_size"))
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "embeddings alone": {},
    "+ questions read as one sequence": {"tasks": CROSS},
    "+ similarity read both ways": {"tasks": JOINT},
    "+ film reviews as a fourth task": {"tasks": {**JOINT, REVIEWS: {**BEST.tasks[REVIEWS], "batch_size": 8}}},
    "+ two epochs, each set drawn about as often": {"training": {"epochs": 2}, "tasks": EVEN},
    "+ losses weighted": {"training": {"epochs": 2}, "tasks": merge(EVEN, _task_options("weight"))},
    "questions read as one sequence, R-Drop": {"tasks": CROSS, "regularisation": {"r_drop": 1.0}},
}


def _first(task: str, **options: Any) -> Mapping[str, Any]:
    """An epoch of one task on the text of all others, and then the recipe."""
    text = {"text": ["sentiment", "paraphrase", "similarity"], **options}
    alone = {"tasks": {task: text}, "training": {"epochs": 1}, "optimizer": {"lr": 5e-5}}
    return {"stages": [alone, {"tasks": {name: {} for name in BEST.tasks}}]}


# Each one changes `best` as it is.
IDEAS: Mapping[str, Mapping[str, Any]] = {
    "best": {},
    "masked words first": _first("mlm"),
    "SimCSE first": _first("simcse", kind="contrastive"),
    "ordinal sentiment": {"tasks": {"sentiment": {"loss": "ordinal"}}},
    "smoothed sentiment": {"tasks": {"sentiment": {"label_smoothing": 0.1}}},
    "sentiment from [CLS]": {"tasks": {"sentiment": {"pooling": "cls"}}},
    "paraphrases read both ways": {"tasks": {"paraphrase": {"encoder": "both"}}},
    "similarity by squared error and CoSENT": {"tasks": {"similarity": {"auxiliary": {"cosent": 0.05}}}},
    "layer-wise rates": {"optimizer": {"layer_decay": 0.9}},
    "rate 7e-5": {"optimizer": {"lr": 7e-5}},
    "rate 1.5e-4": {"optimizer": {"lr": 1.5e-4}},
    "weight decay": {"optimizer": {"weight_decay": 0.01}},
    "three epochs": {"training": {"epochs": 3}},
    "averaged weights": {"training": {"ema": 0.99}},
    "learned loss weights": {"weighting": {"method": "uncertainty"}},
    "dropout 0.2": {"model": {"dropout": 0.2}},
    "PCGrad": {"surgery": {"method": "pcgrad"}},
    "CAGrad": {"surgery": {"method": "cagrad"}},
    "UPGrad": {"surgery": {"method": "upgrad"}},
    "SMART for R-Drop": {"regularisation": {"r_drop": 0.0, "smart": 1.0}},
}
# Without R-Drop, which doubles the time of a run; without learned loss weights, which cost about 0.02 (LOG), so much that
# their interactions would pass for effects of other ideas; and without a first stage. Both screens have the run without any.
SCREENED = (
    (
        "layer-wise rates",
        "averaged weights",
        "ordinal sentiment",
        "similarity by squared error and CoSENT",
        "rate 1.5e-4",
        "PCGrad",
        "weight decay",
    ),
    (
        "three epochs",
        "CAGrad",
        "paraphrases read both ways",
        "smoothed sentiment",
        "dropout 0.2",
        "rate 7e-5",
        "sentiment from [CLS]",
    ),
)


def _screen(ideas: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The ideas of each of eight runs, out of seven. Of any two ideas, two runs have both, two neither, two each one alone.

    All eight runs therefore count for the effect of every idea: its noise is that of two means of four. An effect also
    holds half the interactions of three pairs of other ideas (a 2^(7-4) fractional factorial design; Box, Hunter and Hunter,
    Statistics for Experimenters, 2005, chapter 6).
    """
    runs = {}
    for a, b, c in itertools.product((False, True), repeat=3):
        chosen = tuple(itertools.compress(ideas, (a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c)))
        runs[" + ".join(chosen) or "without R-Drop"] = chosen
    return runs


SCREENS = tuple(_screen(ideas) for ideas in SCREENED)
SCREEN = {variant: ideas for screen in SCREENS for variant, ideas in screen.items()}
SERIES: Mapping[str, Iterable[str]] = {"parts": VARIANTS, "ideas": IDEAS, "screen": SCREEN}


def build_recipe(variant: str, seed: int, data: Path, model: Path | None) -> Recipe:
    """The recipe of a variant, an idea, or a run of the screen."""
    paths: dict[str, Any] = {"data": {"directory": str(data)}, "model": {"name": str(model)} if model else {}}
    training = {"seed": seed, "evaluate_untrained": False}
    best = BEST.with_values({**paths, "training": training}, "ablation")
    if variant in IDEAS:
        return best.with_values(IDEAS[variant], variant)
    if variant in SCREEN:
        ideas = reduce(merge, (IDEAS[idea] for idea in SCREEN[variant]), {"regularisation": {"r_drop": 0.0}})
        return best.with_values(ideas, variant)
    tasks = {name: options for name, options in best.tasks.items() if name != REVIEWS}
    return replace(best, tasks=tasks).with_values(PLAIN, "ablation").with_values(VARIANTS[variant], variant)


def hold_out(data: Path, folder: Path) -> None:
    """Splits each training file of `data` at random into a training file (90 %) and a dev file (10 %) in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = tuple(task.layout for task in build_tasks(BEST).values())
    for path in find_tables(data, "train", datasets).paths.values():
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = csv.reader(file, delimiter="\t")
        order = list(range(len(rows)))
        random.Random(SPLIT_SEED).shuffle(order)
        count = len(rows) // HELD_OUT
        for split, chosen in (("dev", order[:count]), ("train", order[count:])):
            with (folder / path.name.replace("train", split)).open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")
                writer.writerows([head, *(rows[i] for i in sorted(chosen))])


def record(variant: str, seed: int, trial: Trial) -> dict[str, Any]:
    """A run's scores and the facts of its summary."""
    facts = ("steps", "tokens", "seconds", "precision", "device", "commit")
    scores = {metric: trial.score(metric) for metric in METRICS}
    return {"variant": variant, "seed": seed, "scores": scores, **{key: trial.summary.get(key) for key in facts}}


def table(results: Iterable[Mapping[str, Any]], head: str = "one epoch unless stated") -> str:
    """A Markdown table of means ± standard deviations over seeds; `head` stands above the variants."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for result in results:
        found.setdefault(result["variant"], []).append(result["scores"])
    rows = []
    for variant, scores in found.items():
        columns = [[float(each[metric]) for each in scores] for metric in METRICS]
        cells = [f"{statistics.mean(c):.3f}" + (f" ± {statistics.stdev(c):.3f}" if len(c) > 1 else "") for c in columns]
        rows.append((f"{variant} ({len(scores)} {'seed' if len(scores) == 1 else 'seeds'})", *cells))
    return aligned_table((head, *COLUMNS), rows)


def effects(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables of each idea's effect in the screens, with its standard error if there are several seeds."""
    tables = []
    for ideas, screen in zip(SCREENED, SCREENS, strict=True):
        runs = [(screen[result["variant"]], result["scores"]) for result in results if result["variant"] in screen]
        tables.append(_effects(ideas, runs))
    return "\n".join(tables)


def _effects(screened: Sequence[str], runs: Sequence[tuple[tuple[str, ...], Mapping[str, float]]]) -> str:
    rows = []
    for idea in screened:
        cells = []
        for metric in METRICS:
            sides = [[float(s[metric]) for ideas, s in runs if (idea in ideas) == on] for on in (True, False)]
            gain = statistics.mean(sides[0]) - statistics.mean(sides[1])
            cells.append(f"{gain:+.4f}{_error(runs, metric)}")
        rows.append((idea, *cells))
    return aligned_table((f"effect of an idea, {len(runs)} runs", *COLUMNS), rows)


def _error(runs: Sequence[tuple[tuple[str, ...], Mapping[str, float]]], metric: str) -> str:
    """The standard error of an effect, as text to append, from runs that differ in their seed alone; empty for one seed."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for ideas, scores in runs:
        groups.setdefault(ideas, []).append(float(scores[metric]))
    if min(map(len, groups.values())) < 2:
        return ""
    variance = statistics.mean(statistics.variance(values) for values in groups.values())
    return f" ± {2 * math.sqrt(variance / len(runs)):.4f}"


TABLES: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "parts": table,
    "ideas": partial(table, head="best, changed"),
    "screen": effects,
}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("series", nargs="?", choices=list(SERIES), default="parts", help="(parts)")
    parser.add_argument("--data", type=Path, required=True, help="data files in the course's layout")
    parser.add_argument("--model", type=Path, help="encoder weights (default: the embedded tiny model)")
    parser.add_argument("--output", type=Path, required=True, help="a directory for the split and all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", type=Path, help="also write the scores of every run to this file")
    options = parser.parse_args(arguments)
    split = options.output / "data"
    if not split.exists():
        hold_out(options.data, split)
    command = shlex.join(["python", "-m", "benchmarks.ablation", *arguments])
    results = []
    for seed in options.seeds:
        for index, variant in enumerate(SERIES[options.series]):
            print(f"\n== {variant}, seed {seed}", flush=True)
            recipe = build_recipe(variant, seed, split, options.model)
            trial = run_or_resume(variant, recipe, options.output / f"{options.series}-{index}-{seed}", command)
            if trial.failure:
                return 1
            results.append(record(variant, seed, trial))
            if options.json:
                write_json(options.json, {"processor": harness.cpu(), "runs": results})
    print("\n" + TABLES[options.series](results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
