# SPDX-License-Identifier: Apache-2.0
"""Writes a trained model, with a model card, in the format of another library.

python -m minbert_fast.export --checkpoint runs/first/best --format huggingface --output exported/
python -m minbert_fast.export --checkpoint runs/first/best --format huggingface --task sentiment --output exported/
python -m minbert_fast.export --checkpoint runs/first/best --format onnx --int8 --output exported/
python -m minbert_fast.export --checkpoint runs/first/best --format sentence-transformers --output exported/ --push USER/NAME

huggingface: transformers' AutoModel and AutoTokenizer load it; with --task, AutoModelForSequenceClassification and the
pipeline "text-classification" load it and give the same probabilities. onnx: onnxruntime computes the same vectors; with
--task, the same predictions. sentence-transformers (3.4 to 6.2): `SentenceTransformer` loads it and gives the same vectors.
Without --task, huggingface and sentence-transformers include the heads and the recipe, so `Predictor` loads them too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from minbert_fast.common.cli import Parser, add_import_flag, run
from minbert_fast.common.errors import RunError, first_line, translate_write_errors
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_directory, write_text
from minbert_fast.reporting.model_card import model_card, public_recipe
from minbert_fast.tasks import exporting
from minbert_fast.tasks.inference.predictor import Predictor

FORMATS = ("huggingface", "sentence-transformers", "onnx")
HEADS = "heads.safetensors"


def parser() -> argparse.ArgumentParser:
    flags = Parser("export", __doc__ or "")
    add = flags.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a trained model: best/ or last/")
    add("--format", choices=FORMATS, required=True, help="the library to write for")
    add("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    add("--overwrite", action="store_true", help="replace what --output holds")
    head = "huggingface, onnx: export this task's head (default: the encoder alone)"
    add("--task", metavar="NAME", help=head)
    add("--int8", action="store_true", help="onnx: 8-bit weights; a quarter of the size, less exact")
    length = "sentence-transformers, onnx: scale vectors to length 1 (default: the model's setting)"
    add("--normalize", action=argparse.BooleanOptionalAction, help=length)
    add("--push", metavar="USER/NAME", help="then upload it to this repository of the Hugging Face hub")
    add_import_flag(flags)
    add("--private", action="store_true", help="--push: make a new repository private")
    return flags


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    output: Path = options.output
    _check(options, output)
    model = Predictor.from_pretrained(options.checkpoint, device="cpu", precision="fp32", local_files_only=True)
    if options.normalize is not None:
        model.normalize = options.normalize
    task = None if options.task is None else model.task_of(options.task)
    name = options.push or output.resolve().name
    notes: list[str] = []

    def fill(folder: Path) -> None:
        if options.format == "onnx":
            notes.append(exporting.write_onnx(folder, model, task, int8=options.int8))
        elif task is not None:
            notes.append(exporting.write_classifier(folder, model, task))
        else:
            exporting.write_encoder(folder, model, modules=options.format == "sentence-transformers")
            _add_heads(folder, options.checkpoint)
        card = model_card(model, options.checkpoint, name, options.format, task, " ".join(notes))
        write_text(folder / "README.md", card)

    with translate_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_directory(output, fill)
    print(f"{output}: {options.format} model{'' if task is None else f' of task {task}'}")
    for note in filter(None, notes):
        print(note)
    if options.push:
        print(upload(output, options.push, options.private))


def _check(options: argparse.Namespace, output: Path) -> None:
    """Raises ConfigError for flags that do not fit together, and for an --output that is taken."""
    if options.normalize is not None and (options.format == "huggingface" or options.task):
        raise ConfigError("--normalize needs --format sentence-transformers or onnx, and an encoder (no --task)")
    if options.task and options.format == "sentence-transformers":
        raise ConfigError("--task needs --format huggingface or onnx: a SentenceTransformer has no heads")
    if options.int8 and options.format != "onnx":
        raise ConfigError("--int8 needs --format onnx")
    if options.private and not options.push:
        raise ConfigError("--private needs --push")
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not options.overwrite:
        raise ConfigError(f"--output {output}: not empty; choose another folder or add --overwrite")
    checkpoint = options.checkpoint.resolve()
    if output.resolve() == checkpoint:
        raise ConfigError(f"--output {output}: is the checkpoint itself")
    if output.resolve() in checkpoint.parents:
        raise ConfigError(f"--output {output}: holds the checkpoint, which --overwrite would remove")


def _add_heads(folder: Path, source: Path) -> None:
    """Copies the heads and the recipe of the model directory `source`, if it has them."""
    if (source / HEADS).is_file():
        shutil.copyfile(source / HEADS, folder / HEADS)
    recipe = public_recipe(source)
    if recipe is not None:
        write_text(folder / "recipe.toml", recipe.to_toml())


def upload(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder to a hub repository, which it creates if necessary; returns its address. Raises RunError."""
    try:
        hub = huggingface_hub.HfApi()
        created = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=created.repo_id, commit_message="Upload by minbert_fast")
    except Exception as error:  # the hub's own error classes differ between its major versions
        message = f"--push {repository}: not uploaded ({first_line(error)}); the exported model is in {folder}"
        raise RunError(message) from error
    return str(created)


if __name__ == "__main__":
    sys.exit(run(main))
