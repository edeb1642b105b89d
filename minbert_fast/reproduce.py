# SPDX-License-Identifier: Apache-2.0
"""Runs published experiments again: one table, published against measured.

    python -m minbert_fast.reproduce --data DIR --model DIR --output DIR                    all that published scores
    python -m minbert_fast.reproduce sbert-exp1 finetune-all --data DIR --model DIR --output DIR --max-steps 200

Each recipe has a directory under --output. Called again, it goes on where it was stopped and skips what is done. Without
--data and --model it runs on the embedded sample, which shows that the recipes run and nothing else.
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
from minbert_fast.common.storage import write_bytes, write_json
from minbert_fast.data.formats import FORMATS, DataError, find_tables
from minbert_fast.data.sample import sample_directory
from minbert_fast.model.config import BertConfig
from minbert_fast.model.weights import resolve
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.tasks import build_tasks
from minbert_fast.trainer.experiments import Place, Trial, limited, markdown, ran, run_or_resume, shown

METRICS = {
    "sentiment_accuracy": "sentiment",
    "paraphrase_accuracy": "paraphrase",
    "similarity_pearson": "similarity",
    "score": "score",
}


def parser() -> cli.Parser:
    """The command line."""
    command = cli.Parser("reproduce", __doc__ or "")
    command.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all with published scores)")
    command.add_argument("--data", metavar="DIR", help="data files in the course's layout")
    command.add_argument("--model", metavar="DIR|HUB_NAME", help="encoder weights")
    command.add_argument("--output", metavar="DIR", required=True, help="a directory for all runs and the table")
    command.add_argument(
        "--max-steps", metavar="N", type=cli.whole_number, help="steps a recipe, or a stage of it, at most"
    )
    command.add_argument("--seed", metavar="N", type=cli.whole_number)
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--backend", choices=("auto", "fast", "reference"), default="auto")
    return command


def main(arguments: Sequence[str]) -> None:
    """Runs the recipes, one after the other, and writes table.md and table.json after each."""
    chosen = parser().parse_args(arguments)
    names = chosen.names or [name for name in recipe_names() if Recipe.load(name).published]
    values: dict[str, Any] = {"data": {}, "model": {}, "training": {}}
    if chosen.data:
        values["data"]["directory"] = chosen.data
    if chosen.model:
        values["model"]["name"] = chosen.model
    if chosen.seed is not None:
        values["training"]["seed"] = chosen.seed
    recipes = {name: limited(Recipe.load(name).with_values(values, "command line"), chosen.max_steps) for name in names}
    output = Path(chosen.output)
    output.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "minbert_fast.reproduce", *arguments])
    trials = []
    for index, (name, recipe) in enumerate(recipes.items(), 1):
        print(f"\n== {index} of {len(recipes)}: {name}: {recipe.description}", flush=True)
        trial = run_or_resume(name, recipe, output / Path(name).stem, Place(chosen.device, chosen.backend), command)
        if trial.failure:
            print(f"{name}: {trial.failure}", file=sys.stderr, flush=True)
        trials.append(trial)
        written = table(recipes, trials, conditions(trials, chosen.model, chosen.data))
        write_bytes(output / "table.md", written.encode())
        write_json(output / "table.json", [record(recipes[trial.name], trial) for trial in trials])
    print("\n" + (output / "table.md").read_text(encoding="utf-8"), end="")
    failed = [trial.name for trial in trials if trial.failure]
    if failed:
        raise RunError(f"{len(failed)} of {len(trials)} recipes did not run: {', '.join(failed)}")


def record(recipe: Recipe, trial: Trial) -> dict[str, Any]:
    """One recipe's line of table.json."""
    summary = trial.summary or {}
    return {
        "recipe": trial.name,
        "source": recipe.source,
        "published": dict(recipe.published),
        "measured": {metric: trial.score(metric) for metric in METRICS},
        **{key: summary.get(key) for key in ("steps", "seconds", "tokens", "device", "precision", "commit")},
        "without": missing(recipe, trial),
        "failure": trial.failure,
    }


def missing(recipe: Recipe, trial: Trial) -> list[str]:
    """Tasks that the run had to do without, for want of data."""
    found = None if trial.summary is None else ran(trial.directory)
    return [] if found is None else [name for name in build_tasks(recipe) if name not in build_tasks(found)]


def conditions(trials: Sequence[Trial], model: str | None, data: str | None) -> list[str]:
    """Weights, data, and where it ran: what the measured scores depend on beside the recipe."""
    weights = "the embedded tiny model, random weights (a demonstration)"
    if model:
        directory = resolve(model)
        config = directory / "config.json"
        shape = BertConfig.from_file(config) if config.is_file() else None
        size = f", {shape.num_hidden_layers} layers of {shape.hidden_size}" if shape else ""
        weights = f"{Path(model).name}{size}"
    files = []
    folder = Path(data) if data else sample_directory().data
    for split in ("train", "dev"):
        with suppress(DataError):
            found = find_tables(folder, split, tuple(FORMATS)).paths
            counts = (f"{path.name} {count_lines(path) - 1:,}" for path in found.values())
            files.append(f"{split}: {', '.join(counts)}")
    lines = [f"Weights: {weights}.", f"Data: {folder.name}. Rows of {'; '.join(files)}."]
    places = {(s["device"], s["precision"], s["backend"], s["commit"]) for t in trials if (s := t.summary)}
    lines += [
        f"Run on {device}, {precision}, {backend} backend{f', commit {commit[:10]}' if commit else ''}."
        for device, precision, backend, commit in sorted(places, key=str)
    ]
    return lines


def count_lines(path: Path) -> int:
    """Lines of a file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def table(recipes: dict[str, Recipe], trials: Sequence[Trial], measured_with: Sequence[str]) -> str:
    """Published against measured, in Markdown, with what was measured on."""
    rows = []
    for trial in trials:
        published, pairs = recipes[trial.name].published, []
        for metric in METRICS:
            pairs += [shown(published.get(metric)), shown(trial.score(metric))]
        steps = f"{trial.summary['steps']:,}" if trial.summary else "failed"
        rows.append([trial.name, *pairs, steps])
    head = ["recipe", *(f"{name}, {kind}" for name in METRICS.values() for kind in ("published", "measured")), "steps"]
    lines = [
        *measured_with,
        "Published scores are the reports' own, with BERT-base on the whole course data; some are on the test set.",
    ]
    for trial in trials:
        if without := missing(recipes[trial.name], trial):
            lines.append(f"{trial.name} ran without {', '.join(without)}: no data.")
    return markdown(head, rows) + "\n" + "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(cli.run(main))
