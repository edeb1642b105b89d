# SPDX-License-Identifier: Apache-2.0
"""Published rows trained again: which recipes a name selects, the file of finished rows, and the table.

The results file is a JSON list with one entry per row. A row is finished once an entry holds its scores under the same
conditions (`fingerprint`); it does not run again, even if its directory is gone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minbert_fast.common.schema import ConfigError, plain
from minbert_fast.common.storage import remove, write_json
from minbert_fast.data.formats import FORMATS, find_tables
from minbert_fast.data.messages import DataError
from minbert_fast.data.sample import sample_directory
from minbert_fast.model.config import BertConfig
from minbert_fast.model.weights import resolve
from minbert_fast.recipes.recipe import SPLITS, Recipe, recipe_names
from minbert_fast.reporting.runs import read_run
from minbert_fast.trainer import experiments
from minbert_fast.trainer.completing import task_tables
from minbert_fast.trainer.experiments import Trial
from minbert_fast.trainer.resume import WITHOUT_EFFECT

#: Columns of the table, and the metrics that they show; CFIMDB is a sentiment task too.
COLUMNS = {
    "sentiment": ("sentiment_accuracy", "cfimdb_accuracy"),
    "paraphrase": ("paraphrase_accuracy",),
    "similarity": ("similarity_pearson",),
}
#: Conclusions of the reports: claim, the recipe with the higher dev score, the other recipe, and the compared column.
COMPARISONS = (
    ("fine-tuning the encoder beats training the head alone (SST)", "sbert-sst-full", "sbert-sst-frozen", "sentiment"),
    ("the same on CFIMDB", "sbert-cfimdb-full", "sbert-cfimdb-frozen", "sentiment"),
    ("PCGrad helps", "sbert-exp1", "sbert-exp2", "score"),
    ("a linear paraphrase head beats the cosine", "sbert-exp1", "sbert-exp3", "paraphrase"),
    ("no dropout before the similarity head's linear layer", "sbert-exp1", "sbert-exp4", "similarity"),
    (
        "(u, v, abs(u - v)) beats (u, v, u * v)",
        "siamese-paraphrase-u-v-abs-diff",
        "siamese-paraphrase-u-v-product",
        "paraphrase",
    ),
    ("(u, v, u * v) beats (u * v)", "siamese-paraphrase-u-v-product", "siamese-paraphrase-product", "paraphrase"),
    ("squared error beats absolute error", "siamese-similarity-mse", "siamese-similarity-l1", "similarity"),
    ("absolute error beats cross-entropy", "siamese-similarity-l1", "siamese-similarity-cross-entropy", "similarity"),
    ("shared layers help", "bertology-shared", "bertology-baseline", "score"),
    ("the cosine beats a linear layer for similarity", "bertology-head-mod", "bertology-shared", "similarity"),
    ("NLI triplets first help", "bertology-nli-triplet", "bertology-head-mod", "score"),
    ("triplets beat regression", "bertology-nli-triplet", "bertology-nli-regression", "score"),
    ("triplets beat the contrastive loss", "bertology-nli-triplet", "bertology-nli-contrastive", "score"),
    ("training sentiment with the pairs beats a frozen encoder", "bertology-head-mod", "bertology-freeze-sst", "score"),
    ("the cosine beats a linear layer for similarity", "finetune-cosine", "finetune-baseline", "similarity"),
    ("gradient surgery helps", "finetune-pcgrad", "finetune-baseline", "mean"),
    ("a loop on similarity first helps", "finetune-similarity-first", "finetune-baseline", "similarity"),
    ("all together beat the baseline", "finetune-all", "finetune-baseline", "mean"),
    ("masked words, cosine embedding loss and decay help", "enhancing-final", "enhancing-base", "score"),
)
#: The conditions of a row: only rows under the same ones are compared.
CONDITIONS = ("weights", "data", "epochs_scale", "max_steps")
#: The keys that every row has.
NEEDED = {"published", "measured", "dev_rows", "epochs", "without", "failure", "fingerprint", *CONDITIONS}
FACTS = ("steps", "seconds", "tokens", "device", "precision", "backend", "commit")
DISCARDED = ("best", "last", "checkpoints/step-*", "best-*")  # the large parts of a finished run

Scores = Mapping[str, float | None]
Row = Mapping[str, Any]


# ---- Which rows ------------------------------------------------------------------------------------------------------


def published_names() -> list[str]:
    """The recipes with published scores, by report."""
    return [name for name in recipe_names() if Recipe.load(name).published]


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


# ---- The table -------------------------------------------------------------------------------------------------------


def score(scores: Scores) -> float | None:
    """The score that the report or the run states, else that of its three tasks; None without all three."""
    sst, para, sts = task_scores(scores)
    if sst is None or para is None or sts is None:
        return None
    stated = scores.get("score")
    return (sst + para + (sts + 1) / 2) / 3 if stated is None else stated


def plain_mean(scores: Scores) -> float | None:
    """The plain mean of the three tasks' scores, the "overall" of the `finetune` report."""
    found = [value for value in task_scores(scores) if value is not None]
    return sum(found) / 3 if len(found) == 3 else None


def task_scores(scores: Scores) -> list[float | None]:
    """One score for each of COLUMNS."""
    return [next((scores[m] for m in metrics if scores.get(m) is not None), None) for metrics in COLUMNS.values()]


def table(rows: Iterable[Row]) -> str:
    """Published against measured scores in Markdown, a line for each row."""
    head = ["recipe", *COLUMNS, "score", "mean", *(f"train: {column}" for column in COLUMNS), "epochs", "steps"]
    lines = []
    for row in rows:
        cells = []
        for split in ("dev", "train"):
            published, found = row["published"][split], row["measured"][split]
            pairs = list(zip(task_scores(published), task_scores(found), strict=True))
            if split == "dev":
                pairs += [(score(published), score(found)), (plain_mean(published), plain_mean(found))]
            cells += [_cell(*pair) for pair in pairs]
        epochs = " + ".join(f"{epochs:g}" for epochs in row["epochs"])
        name = row["recipe"] + (f" (without {', '.join(row['without'])})" if row["without"] else "")
        lines.append([name, *cells, epochs, "failed" if row["failure"] else f"{row['steps']:,}"])
    return experiments.markdown_table(head, lines)


def _cell(published: float | None, found: float | None) -> str:
    if published is None and found is None:
        return ""
    return " / ".join("-" if value is None else f"{value:.3f}" for value in (published, found))


def comparisons(rows: Mapping[str, Row]) -> str:
    """Which of the reports' comparisons the measured scores repeat, in Markdown; empty if no pair was measured."""
    lines = []
    for claim, better, worse, column in COMPARISONS:
        found = [rows[name] for name in (better, worse) if name in rows]
        pair = [row for row in found if not row["failure"] and not row["without"]]
        values = [_column(row[part]["dev"], column) for part in ("published", "measured") for row in pair]
        known = [value for value in values if value is not None]
        alike = len({tuple(row[key] for key in CONDITIONS) for row in pair}) == 1
        if len(known) == 4 and alike:
            first, second, own, other = known
            margin = 2 * math.hypot(*(standard_error(row, column) for row in pair))
            holds = "unclear" if abs(own - other) < margin else "yes" if own > other else "no"
            pairs = f"{first:.3f}, {second:.3f}", f"{own:.3f}, {other:.3f}"
            lines.append([claim, f"{better}, {worse}", column, *pairs, f"{margin:.3f}", holds])
    if not lines:
        return ""
    head = ["the report says", "rows", "by", "published", "measured", "margin", "holds"]
    return (
        f"{experiments.markdown_table(head, lines)}\nA comparison is unclear if the measured scores differ by less than the "
        "margin, two standard errors of\ntheir difference over the dev rows. Each row is one run; another seed may move a "
        "score as far. Rows with other weights, data\nor --epochs-scale are not compared.\n"
    )


def _column(scores: Scores, column: str) -> float | None:
    if column in COLUMNS:
        return task_scores(scores)[list(COLUMNS).index(column)]
    return score(scores) if column == "score" else plain_mean(scores)


def standard_error(row: Row, column: str) -> float:
    """The standard error of a measured dev score over its n rows, tasks counted as independent.

    sqrt(p (1 - p) / n) for an accuracy p, (1 - r^2) / sqrt(n - 1) for a Pearson correlation r (Fisher 1921).
    """
    scores, errors = row["measured"]["dev"], {}
    for name, metrics in COLUMNS.items():
        for metric in metrics:
            if (value := scores.get(metric)) is not None:
                task, _, kind = metric.rpartition("_")
                n = row["dev_rows"][task]
                errors[name] = math.sqrt(
                    value * (1 - value) / n if kind == "accuracy" else (1 - value**2) ** 2 / (n - 1)
                )
    if column in COLUMNS:
        return errors[column]
    if column == "score":  # it takes half of the correlation
        errors["similarity"] /= 2
    return math.hypot(*errors.values()) / 3


def page(rows: Mapping[str, Row]) -> str:
    """The table, the reports' comparisons and the notes, in Markdown."""
    shown = [rows[name] for name in sorted(rows)]
    below = "\n\n".join(notes(shown))
    return "\n".join(filter(None, [table(shown), comparisons(rows), below])) + "\n"


def published_table() -> str:
    """The published scores of all rows in Markdown."""
    lines = []
    for recipe in map(Recipe.load, published_names()):
        published = recipe.published
        minutes = "" if published.seconds is None else f"{published.seconds / 60:.0f} min"
        place = ": ".join(filter(None, (published.table, published.row)))
        lines.append([f"`{recipe.name}`", place, *(_triple(getattr(published, s)) for s in SPLITS), minutes])
    return experiments.markdown_table(["recipe", "the report's row", *SPLITS, "time"], lines)


def notes(rows: Sequence[Row]) -> list[str]:
    """The paragraphs below the table: what a cell holds, weights, data, devices, and what differs from the reports."""
    lines = [
        "Each cell: published / measured. Sentiment (CFIMDB in its rows) and paraphrase are accuracies, similarity is "
        "Pearson's correlation, all on dev, then on training rows; score = (sentiment + paraphrase + (similarity + 1) / 2) "
        "/ 3, mean is the plain mean of the three.",
        "Published scores are the reports' own, with BERT-base on the whole course data.",
        *(f"Weights: {weights}." for weights in _each(rows, "weights")),
        *(f"Data: {data}." for data in _each(rows, "data")),
    ]
    scales = _each(rows, "epochs_scale")
    if scales != [1.0]:
        lines.append(f"Epochs are {' or '.join(f'{scale:g}' for scale in scales)} times the reports' (--epochs-scale).")
    if limits := [limit for limit in _each(rows, "max_steps") if limit is not None]:
        lines.append(f"At most {' or '.join(map(str, limits))} steps a run (--max-steps).")
    done = [row for row in rows if not row["failure"]]
    for device, precision, backend, commit in sorted({tuple(str(row[k] or "") for k in FACTS[3:]) for row in done}):
        lines.append(f"Run on {device}, {precision}, {backend} backend{f', commit {commit[:10]}' if commit else ''}.")
    own = [row["recipe"] for row in rows if row["best_per_task"]]
    if own:
        lines.append(f"Each task's own best model (one by one, as the report trained them): {', '.join(own)}.")
    lines += [f"{row['recipe']} ran without {', '.join(row['without'])}: no data." for row in rows if row["without"]]
    return lines + [f"{row['recipe']} failed: {row['failure']}" for row in rows if row["failure"]]


def _each(rows: Iterable[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def listing(names: Sequence[str]) -> str:
    """The published scores of recipes as text, by report: sentiment, paraphrase, similarity of each split."""
    recipes = [Recipe.load(name) for name in names]
    width = max((len(name) for name in names), default=0)
    lines: list[str] = []
    for source in dict.fromkeys(recipe.source for recipe in recipes):
        lines += ["", source or "without a report"]
        for recipe in recipes:
            if recipe.source != source:
                continue
            published = recipe.published
            parts = [f"{split} {_triple(scores)}" for split in SPLITS if (scores := getattr(published, split))]
            if published.seconds is not None:
                parts.append(f"{published.seconds / 60:.0f} min")
            place = ", ".join(filter(None, (published.table, published.row)))
            lines += [f"  {recipe.name:{width}}  {'; '.join(parts)}", f"  {'':{width}}  {place}"]
    total = sum(bool(recipe.published) for recipe in recipes)
    columns = "sentiment (or CFIMDB), paraphrase, similarity; then the score, if the report states it"
    return "\n".join([f"{total} published rows. Columns: {columns}", *lines])


def _triple(scores: Scores) -> str:
    if not scores:
        return ""
    values = [*task_scores(scores), *([scores["score"]] if "score" in scores else [])]
    return ", ".join("-" if value is None else f"{value:.3f}" for value in values)
