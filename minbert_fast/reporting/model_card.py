# SPDX-License-Identifier: Apache-2.0
"""The model card (README.md) of an exported model: use, training data, scores, recipe and versions.

All statements come from the recipe in the model's directory and the `summary.json` one directory up; what neither file
contains is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minbert_fast.common.version import __version__
from minbert_fast.data.formats import FORMATS
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.runs import format_score, read_json
from minbert_fast.tasks import build_tasks
from minbert_fast.tasks.predictor import Predictor

_SNIPPETS = {
    "huggingface": """from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
embeddings = model.encode(["A sentence.", "Another one."])
""",
}
_OWN_SNIPPET = """from minbert_fast import Predictor

model = Predictor.from_pretrained("{name}")
embeddings = model.encode(["A sentence.", "Another one."])
"""
_CALLS = {"sentiment": '(["A sentence."])', "paraphrase": '([("One?", "Two?")])', "similarity": '([("One.", "Two.")])'}
_POOLED = {"mean": "the mean", "cls": "the first", "max": "the maximum", "pooler": "the pooler's output"}


def public_recipe(source: Path) -> Recipe | None:
    """The recipe in a model's directory, with all paths of this machine reduced to their last part; None without one."""
    if not (source / "recipe.toml").is_file():
        return None
    recipe = Recipe.load(str(source / "recipe.toml"))
    name, data = recipe.model.name, recipe.data
    files = {task: {split: Path(path).name for split, path in paths.items()} for task, paths in data.files.items()}
    return replace(
        recipe,
        model=replace(recipe.model, name=Path(name).name if Path(name).is_absolute() or Path(name).exists() else name),
        data=replace(data, directory=Path(data.directory).name, files=files, cache=""),
    )


def model_card(model: Predictor, source: Path, name: str, form: str) -> str:
    """The card of the model in directory `source`, exported under `name` in the format `form`."""
    recipe = public_recipe(source)
    summary = read_json(source.parent / "summary.json", notices=[])
    library = "sentence-transformers" if form == "sentence-transformers" else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: sentence-similarity", "tags:", "- bert", "- minbert_fast"]
    head += ["- sentence-similarity", *(["- sentence-transformers"] if library != "transformers" else []), "---", ""]
    config = model.encoder.config
    pooled = f"{_POOLED[model.pooling]} of its tokens' vectors{', scaled to length 1,' if model.normalize else ''}"
    kinds = [] if model.heads is None else dict.fromkeys(t.preset for t in model.tasks.values() if t.preset in _CALLS)
    calls = "".join(f"model.{kind}{_CALLS[kind]}\n" for kind in kinds)
    parts = [
        "\n".join([*head, f"# {name}"]),
        f"A BERT encoder of {config.num_hidden_layers} layers, {config.hidden_size} wide, with "
        f"{config.vocab_size:,} word pieces. A sentence's vector is {pooled} of up to {model.max_length} tokens.",
        "## Use",
        _code(_SNIPPETS[form].format(name=name)),
        _code(_OWN_SNIPPET.format(name=name) + calls),
    ]
    if recipe is not None:
        parts += _training(recipe, summary)
    if isinstance(summary.get("dev"), Mapping):
        parts += _scores(summary)
    versions = {"minbert_fast": __version__, **dict(summary.get("versions") or {})}
    parts += ["## Versions", ", ".join(f"{package} {version}" for package, version in versions.items())]
    if recipe is not None:
        code = _code(recipe.to_toml(), "toml")
        parts += ["## Recipe", f"<details><summary>Every value</summary>\n\n{code}\n\n</details>"]
    return "\n\n".join(parts) + "\n"


def _training(recipe: Recipe, summary: Mapping[str, Any]) -> list[str]:
    tasks = build_tasks(recipe)
    stems = {name: ", ".join(FORMATS[s.layout].stem for s in task.sources if s.layout) for name, task in tasks.items()}
    rows = [f"| {name} | {task.preset or task.kind} | {stems[name]} files |" for name, task in tasks.items()]
    surgery = recipe.surgery.method
    method = "their summed losses" if surgery == "none" else f"gradient surgery ({surgery}) between them"
    sentences = [f"Trained on {len(tasks)} tasks at once with {method}." if len(tasks) > 1 else "Trained on one task."]
    if recipe.model.name:
        sentences.append(f"It began from the weights `{recipe.model.name}`.")
    if isinstance(summary.get("steps"), int):
        sentences.append(f"{summary['steps']:,} steps, {summary.get('tokens', 0):,} tokens.")
    if summary.get("demonstration"):
        sentences.append("**A demonstration on made-up sample data, not for real use.**")
    return ["## Training", " ".join(sentences), "\n".join(["| task | kind | data |", "|---|---|---|", *rows])]


def _scores(summary: Mapping[str, Any]) -> list[str]:
    untrained = summary.get("untrained") or {}
    rows = [
        f"| {k.replace('_', ' ')} | {format_score(untrained.get(k))} | {format_score(v)} |"
        for k, v in summary["dev"].items()
    ]
    head = ["| metric | untrained | this model |", "|---|---|---|"]
    return ["## Scores", "On the dev files.", "\n".join([*head, *rows])]


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text.rstrip()}\n```"
