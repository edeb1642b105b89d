# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of an exported model: use, training data, scores, recipe and versions.

All statements come from the recipe in the model's directory and the `summary.json` one directory up; what neither file
contains is left out. The metadata on top are `huggingface_hub`'s, with the scores as a `model-index` that the hub shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from minbert_fast.common.version import __version__
from minbert_fast.data.formats import FORMATS
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting import markdown
from minbert_fast.reporting.runs import display_name, format_score, numbers, read_json
from minbert_fast.reporting.usage import usage
from minbert_fast.tasks import Task, build_tasks
from minbert_fast.tasks.inference.predictor import Predictor

_METRICS = {  # our names and the hub's
    "macro_f1": ("f1", "macro-F1"), "pearson": ("pearsonr", "Pearson"), "spearman": ("spearmanr", "Spearman"),
    "matthews": ("matthews_correlation", "Matthews"), "mae": ("mae", "mean absolute error"),
}  # fmt: skip
_POOLED = {"mean": "the mean", "cls": "the first", "max": "the maximum", "pooler": "the pooler's output"}


def public_recipe(source: Path) -> Recipe | None:
    """The recipe in a model's directory, with all paths of this machine reduced to their last part; None without one."""
    if not (source / "recipe.toml").is_file():
        return None
    recipe = Recipe.load(str(source / "recipe.toml"))
    recipe = recipe.with_paths(
        lambda path: Path(path).name if Path(path).is_absolute() or Path(path).exists() else path
    )
    return replace(recipe, data=replace(recipe.data, cache=""))


def model_card(model: Predictor, source: Path, name: str, form: str, task: str | None = None, note: str = "") -> str:
    """The card of the model in directory `source`, exported under `name` in the format `form`.

    `task` names the exported head (None: the encoder), `note` is a sentence about the files.
    """
    recipe = public_recipe(source)
    summary = read_json(source.parent / "summary.json", notices=[])
    library = {"huggingface": "transformers"}.get(form, form)
    tag = "sentence-similarity" if task is None else "text-classification"
    results = _model_index(build_tasks(recipe) if recipe else {}, numbers(summary.get("dev")))
    data = ModelCardData(
        library_name=library,
        pipeline_tag=tag,
        tags=["bert", "minbert_fast", tag, *([library] if library == "sentence-transformers" else [])],
        model_name=name.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {name}", _about(model, task), *([note] if note else []), "## Use"]
    parts += [_code(block) for block in usage(model, name, form, task)]
    if recipe is not None:
        parts += _training(recipe, summary)
    if isinstance(summary.get("dev"), Mapping):
        parts += _scores(summary)
    versions = {"minbert_fast": __version__, **dict(summary.get("versions") or {})}
    parts += ["## Versions", ", ".join(f"{package} {version}" for package, version in versions.items())]
    if recipe is not None:
        code = _code(recipe.to_toml(), "toml")
        parts += ["## Recipe", f"<details><summary>Every value</summary>\n\n{code}\n\n</details>"]
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _model_index(tasks: Mapping[str, Task], dev: Mapping[str, float]) -> list[EvalResult]:
    """The dev scores of each task, as the hub lists them."""
    results = []
    for key, value in dev.items():
        owners = [name for name in tasks if key.startswith(f"{name}_")]
        if not owners or key.endswith("_loss"):
            continue
        name = max(owners, key=len)  # of tasks `a` and `a_b`, `a_b_accuracy` is the second one's
        metric = key.removeprefix(f"{name}_")
        hub_name, words = _METRICS.get(metric, (metric, metric.replace("_", " ")))
        data = _data_of(tasks[name])
        results.append(
            EvalResult(
                task_type="text-classification" if tasks[name].class_names else "sentence-similarity",
                task_name=name,
                dataset_type=data,
                dataset_name=data,
                dataset_config=name,  # keeps two tasks on the same data apart: the hub joins results of equal data
                dataset_split="dev",
                metric_type=hub_name,
                metric_name=words,
                metric_value=round(value, 6),
            )
        )
    return results


def _data_of(task: Task) -> str:
    """The names of the data sets that a task was trained on."""
    names = [FORMATS[each.layout].stem if each.layout in FORMATS else each.hub for each in task.sources]
    files = [Path(file).name for each in task.sources if not each.hub for file in each.files("train")]
    return ", ".join([*filter(None, names), *files]) or task.name


def _about(model: Predictor, task: str | None) -> str:
    config = model.encoder.config
    shape = f"{config.num_hidden_layers} layers, {config.hidden_size} wide, with {config.vocab_size:,} word pieces"
    if task is None:
        pooled = f"{_POOLED[model.pooling]} of its tokens' vectors{', scaled to length 1,' if model.normalize else ''}"
        return f"A BERT encoder of {shape}. A sentence's vector is {pooled} of up to {model.max_length} tokens."
    names = model.tasks[task].class_names
    answers = "a number" if names is None else f"one of {len(names)} classes ({', '.join(names)})"
    return f"BERT of {shape}, and its head for the task {task}, which predicts {answers}."


def _training(recipe: Recipe, summary: Mapping[str, Any]) -> list[str]:
    tasks = build_tasks(recipe)
    rows = [(name, task.preset or task.kind, _data_of(task)) for name, task in tasks.items()]
    surgery = recipe.surgery.method
    method = "their summed losses" if surgery == "none" else f"gradient surgery ({surgery}) between them"
    sentences = [f"Trained on {len(tasks)} tasks at once with {method}." if len(tasks) > 1 else "Trained on one task."]
    if recipe.model.name:
        sentences.append(f"It began from the weights `{recipe.model.name}`.")
    if isinstance(summary.get("steps"), int):
        sentences.append(f"{summary['steps']:,} steps, {summary.get('tokens', 0):,} tokens.")
    if summary.get("demonstration"):
        sentences.append("**A demonstration on made-up sample data, not for real use.**")
    return ["## Training", " ".join(sentences), "\n".join(markdown.table(("task", "kind", "data"), rows))]


def _scores(summary: Mapping[str, Any]) -> list[str]:
    untrained = summary.get("untrained") or {}
    rows = [(display_name(k), format_score(untrained.get(k)), format_score(v)) for k, v in summary["dev"].items()]
    return ["## Scores", "On the dev files.", "\n".join(markdown.table(("metric", "untrained", "this model"), rows))]


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text.rstrip()}\n```"
