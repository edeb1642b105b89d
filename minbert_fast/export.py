# SPDX-License-Identifier: Apache-2.0
"""Writes a trained model, with a model card, in the format of another library.

python -m minbert_fast.export --checkpoint runs/first/best --format huggingface --output exported/
python -m minbert_fast.export --checkpoint runs/first/best --format sentence-transformers --output exported/ --push USER/NAME

huggingface: transformers' AutoModel and AutoTokenizer load it. sentence-transformers (3.4 to 6.2): `SentenceTransformer`
loads it and gives the same embeddings. Both include the heads and the recipe, so `Predictor` loads them too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from minbert_fast.common.cli import Parser, add_import_flag, run
from minbert_fast.common.errors import RunError, translate_write_errors
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_directory, write_text
from minbert_fast.model import sentence_modules
from minbert_fast.model.sentence_modules import SentenceModules
from minbert_fast.reporting.model_card import model_card, public_recipe
from minbert_fast.tasks.predictor import Predictor

FORMATS = ("huggingface", "sentence-transformers")
HEADS = "heads.safetensors"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = Parser("export", __doc__ or "")
    flags.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a trained model: best/ or last/")
    flags.add_argument("--format", choices=FORMATS, required=True, help="the library to write for")
    flags.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    flags.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    flags.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="sentence-transformers: scale vectors to length 1 (default: the model's setting)",
    )
    flags.add_argument("--push", metavar="USER/NAME", help="then upload it to this repository of the Hugging Face hub")
    add_import_flag(flags)
    flags.add_argument("--private", action="store_true", help="--push: make a new repository private")
    return flags


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises ConfigError, RunError or OSError for mistakes of the user."""
    options = parser().parse_args(arguments)
    if options.normalize is not None and options.format != "sentence-transformers":
        raise ConfigError("--normalize needs --format sentence-transformers")
    if options.private and not options.push:
        raise ConfigError("--private needs --push")
    output: Path = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not options.overwrite:
        raise ConfigError(f"--output {output}: not empty; choose another folder or add --overwrite")
    if output.resolve() == options.checkpoint.resolve():
        raise ConfigError(f"--output {output}: is the checkpoint itself")
    model = Predictor.from_pretrained(options.checkpoint, device="cpu", precision="fp32", local_files_only=True)
    if options.normalize is not None:
        model.normalize = options.normalize
    name = options.push or output.resolve().name
    card = model_card(model, options.checkpoint, name, options.format)
    with translate_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_directory(output, lambda folder: write_model(model, options.checkpoint, folder, options.format, card))
    print(f"{output}: {options.format} model")
    if options.push:
        print(upload(output, options.push, options.private))


def write_model(model: Predictor, source: Path, folder: Path, form: str, card: str) -> None:
    """Writes the model and its card to `folder` in the format `form`; copies the heads from directory `source`."""
    model.encoder.save_pretrained(folder)
    model.tokenizer.save(folder)
    if (source / HEADS).is_file():
        shutil.copyfile(source / HEADS, folder / HEADS)
    recipe = public_recipe(source)
    if recipe is not None:
        write_text(folder / "recipe.toml", recipe.to_toml())
    if form == "sentence-transformers":
        dense = model.encoder.pooler_dense
        pooler = {"weight": dense.weight, "bias": dense.bias} if model.pooling == "pooler" else None
        hidden = model.encoder.config.hidden_size
        cut = model.width if model.width < hidden else None
        modules = SentenceModules(folder, model.pooling, model.normalize, model.max_length, model.prompt, pooler, cut)
        sentence_modules.write(folder, modules, hidden)
    write_text(folder / "README.md", card)


def upload(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder to a hub repository, which it creates if necessary; returns its address. Raises RunError."""
    try:
        hub = huggingface_hub.HfApi()
        created = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=created.repo_id, commit_message="Upload by minbert_fast")
    except Exception as error:  # the hub's own error classes differ between its major versions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"--push {repository}: not uploaded ({reason}); the exported model is in {folder}") from error
    return str(created)


if __name__ == "__main__":
    sys.exit(run(main))
