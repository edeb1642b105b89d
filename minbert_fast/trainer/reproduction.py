# SPDX-License-Identifier: Apache-2.0
"""Published rows trained again: which recipes a name selects, and the file of finished rows.

The results file is a JSON list with one entry per row. A row is finished once an entry holds its scores under the same
conditions (`fingerprint`); it does not run again, even if its directory is gone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from minbert_fast.common.schema import ConfigError, plain
from minbert_fast.common.storage import remove, write_json
from minbert_fast.data.formats import FORMATS, find_tables
from minbert_fast.data.messages import DataError
from minbert_fast.data.sample import sample_directory
from minbert_fast.model.config import BertConfig
from minbert_fast.model.weights import resolve
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.reporting.published import CONDITIONS, FACTS, Row, published_names
from minbert_fast.reporting.runs import read_run
from minbert_fast.trainer import experiments
from minbert_fast.trainer.completing import task_tables
from minbert_fast.trainer.experiments import Trial
from minbert_fast.trainer.resume import WITHOUT_EFFECT

#: The keys that every row has.
NEEDED = {"published", "measured", "dev_rows", "epochs", "without", "failure", "fingerprint", *CONDITIONS}
DISCARDED = ("best", "last", "checkpoints/step-*", "best-*")  # the large parts of a finished run


# ---- Which rows ------------------------------------------------------------------------------------------------------


def select_names(chosen: Sequence[str]) -> list[str]:
    """The recipes that `chosen` selects, each once; none selects all published ones.

    An entry is a recipe's name or a .toml file, a pattern such as `siamese-*`, or the first word of several names, such as
    `finetune`, for all published recipes of a report; a name comes first. Raises ConfigError for an entry that selects
    nothing.
    """
    published, known = published_names(), recipe_names()
    if not chosen:
        return published
    names: dict[str, None] = {}
    for entry in chosen:
        if any(mark in entry for mark in "*?["):
            found = fnmatch.filter(known, entry)
        else:
            report = [name for name in published if name.split("-")[0] == entry]
            found = report if report and entry not in known else [entry]
        if not found:
            raise ConfigError(f"{entry}: no recipe's name matches; `--list` shows them")
        names |= dict.fromkeys(found)
    return list(names)


def scale_epochs(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with `factor` times the epochs in each stage.

    An epoch that goes task by task cannot be cut without losing a task: such stages keep whole epochs, at least one.
    """

    def scaled(epochs: float, scheme: str) -> float:
        return max(1.0, float(round(epochs * factor))) if scheme == "sequential" else epochs * factor

    if factor == 1.0:
        return recipe
    scheme = recipe.data.scheme
    training = replace(recipe.training, epochs=scaled(recipe.training.epochs, scheme))
    stages = []
    for stage, whole in zip(recipe.stages, recipe.resolved_stages(), strict=False):
        epochs = scaled(whole.training.epochs, whole.data.scheme)
        stages.append({**stage, "training": {**stage.get("training", {}), "epochs": epochs}})
    return replace(recipe, training=training, stages=tuple(stages))


# ---- The results file ------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a results file by recipe; empty if there is no file. Raises ConfigError for a damaged one."""
    if not path.exists():
        return {}
    try:
        rows = {row["recipe"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
        if incomplete := [name for name, row in rows.items() if not row.keys() >= NEEDED]:
            raise KeyError(f"row {incomplete[0]} lacks one of {', '.join(sorted(NEEDED))}")
        return rows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: expected a list of rows that `reproduce` wrote ({error})") from None


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """Writes the rows in the order of the recipes' names."""
    write_json(path, [rows[name] for name in sorted(rows)])


def fingerprint(recipe: Recipe, backend: str) -> str:
    """A digest of all values that change the scores. Weights and data count by name, wherever their folders are."""
    values = {key: value for key, value in plain(recipe).items() if key not in WITHOUT_EFFECT}
    values["model"]["name"] = Path(recipe.model.name).name
    values["data"]["directory"] = Path(recipe.data.directory).name
    for key in ("cache", "held_out"):
        values["data"].pop(key)
    text = json.dumps([values, backend], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def make_row(name: str, recipe: Recipe, trial: Trial, backend: str, factor: float) -> Row:
    """The entry of one run. `factor` is the one of `--epochs-scale`."""
    executed = experiments.load_executed_recipe(trial.directory) if trial.summary else None
    tasks, kept = (dict.fromkeys(name for name, _ in task_tables(each)) for each in (recipe, executed or recipe))
    stages = recipe.resolved_stages()
    return {
        "recipe": name,
        "source": recipe.source,
        "description": recipe.description,
        "published": asdict(recipe.published),
        "measured": {"dev": measured(trial, "dev"), "train": measured(trial, "train")},
        "dev_rows": {} if trial.failure else dev_rows(trial.directory),
        "best_per_task": "best_per_task" in trial.summary,
        "untrained": trial.summary.get("untrained"),
        "epochs": [stage.training.epochs for stage in stages],
        "epochs_scale": factor,
        "max_steps": recipe.training.max_steps,
        **{key: trial.summary.get(key) for key in FACTS},
        "weights": describe_weights(recipe.model.name),
        "data": describe_data(recipe.data.directory),
        "without": [task for task in tasks if task not in kept],
        "failure": trial.failure,
        "fingerprint": fingerprint(recipe, backend),
    }


def measured(trial: Trial, split: str) -> dict[str, float | None]:
    """The run's scores: of the best model, or of each task's own best model if the run kept those."""
    scores = dict(trial.summary.get(split, {}))
    for task, kept in trial.summary.get("best_per_task", {}).items():
        own = kept["metrics"] if split == "dev" else kept.get("train", {})
        scores |= {metric: value for metric, value in own.items() if metric.startswith(f"{task}_")}
    return scores


def dev_rows(directory: Path) -> dict[str, int]:
    """How many rows scored each task of a finished run."""
    return {task: len(details["predictions"]) for task, details in read_run(directory).tasks.items()}


def discard_models(directory: Path) -> None:
    """Removes a finished run's models and checkpoints; its scores, records, predictions and report stay."""
    for pattern in DISCARDED:
        for path in directory.glob(pattern):
            remove(path)


def describe_weights(model: str) -> str:
    """The encoder's name and size."""
    if not model:
        return "the embedded tiny model, random weights (a demonstration)"
    config = resolve(model) / "config.json"
    shape = BertConfig.from_file(config) if config.is_file() else None
    size = f", {shape.num_hidden_layers} layers of {shape.hidden_size}" if shape else ""
    return f"{Path(model).name}{size}"


def describe_data(directory: str) -> str:
    """The data folder's name and the rows of its files."""
    folder = Path(directory) if directory else sample_directory().data
    parts = []
    for split in ("train", "dev"):
        with suppress(DataError):
            found = find_tables(folder, split, tuple(FORMATS)).paths
            parts.append(f"{split}: {', '.join(f'{path.name} {_lines(path) - 1:,}' for path in found.values())}")
    return f"{folder.name}, rows of {'; '.join(parts)}"


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
