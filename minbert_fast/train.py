# SPDX-License-Identifier: Apache-2.0
"""Trains a multitask model. Without flags: a demonstration.

  minbert-fast train --data DIR --model DIR --output DIR         the course's files
  minbert-fast train --data FILE --text COLUMN --label COLUMN    one file, one task

--set overrides flags, flags override the recipe; `recipes keys` lists all keys.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minbert_fast import surgery
from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError, Whole, field_types, merge
from minbert_fast.data.inputs import ENDINGS
from minbert_fast.recipes.recipe import Recipe, parse_assignments
from minbert_fast.reporting.runs import flatten
from minbert_fast.tasks import build_task, build_tasks
from minbert_fast.trainer.completing import without_tasks
from minbert_fast.trainer.fit import task_name
from minbert_fast.trainer.job import BACKENDS, DEVICES, Options, train
from minbert_fast.trainer.outputs import saved_recipe_path
from minbert_fast.trainer.resume import require_run


@dataclass(frozen=True)
class Flag:
    """A flag that sets one value of the recipe and takes its type and choices from the recipe's field."""

    key: str  # section.field
    name: str
    metavar: str
    help: str
    also: tuple[str, ...] = ()  # spellings of the course's scripts


RECIPE_FLAGS = (
    Flag("data.directory", "--data", "DIR|FILE", "data in the course's layout, or one file"),
    Flag("model.name", "--model", "DIR|HUB_NAME", "weights: a directory, hub name or course .pt file"),
    Flag("training.epochs", "--epochs", "N", "passes over the data, such as 3 or 0.25"),
    Flag("training.max_steps", "--max-steps", "N", "length of run and schedule, not --epochs", ("--max_steps",)),
    Flag("training.batch_size", "--batch-size", "N", "examples per task and step", ("--batch_size",)),
    Flag("optimizer.lr", "--lr", "F", "learning rate"),
    Flag("model.dropout", "--dropout", "P", "dropout of the encoder"),
    Flag("model.freeze", "--freeze", "", "train the heads only"),
    Flag("training.patience", "--patience", "N", "stop after N evaluations without a better score"),
    Flag("surgery.method", "--surgery", "METHOD", f"{', '.join(surgery.METHODS)}, torchjd:NAME"),
    Flag("training.seed", "--seed", "N", "seed of all random numbers"),
    Flag("training.precision", "--precision", "NAME", "of matrix products"),
)

# The course's short names of its data files, and our names of the datasets.
COURSE_DATASETS = {"sst": "sentiment", "para": "paraphrase", "sts": "similarity"}
COURSE_OPTIONS: Mapping[str, dict[str, Any]] = {
    "pretrain": {"model": {"freeze": True}, "optimizer": {"lr": 1e-3}},
    "finetune": {"model": {"freeze": False}, "optimizer": {"lr": 1e-5}},
}
MODEL_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")


def parser() -> argparse.ArgumentParser:
    """The command's flags: what people set, then the course's, which only --help-course shows."""
    command = cli.Parser("train", __doc__ or "", usage="%(prog)s [flags]")
    flags = {flag.name: flag for flag in RECIPE_FLAGS}
    dropout = flags.pop("--dropout")
    add = command.add_argument
    add("--recipe", metavar="NAME|FILE", help="the experiment: a name, or a .toml file")
    add_flag(command, flags.pop("--data"))
    add("--text", metavar="COLUMNS", help="--data FILE: its column of text; two: a,b")
    add("--label", metavar="COLUMN", help="--data FILE: its column of labels")
    add("--kind", help="--data FILE: the task (default: by the labels)")
    add("--dev", metavar="FILE", help="dev file of --data FILE (default: a tenth)")
    add_flag(command, flags.pop("--model"))
    add("--output", metavar="DIR", type=Path, help="results (default: a new one under runs/)")
    add("--tasks", metavar="NAME,NAME", help="train these tasks only")
    for flag in flags.values():
        add_flag(command, flag)
    add("--device", metavar="NAME", choices=DEVICES, default="auto", help=", ".join(DEVICES))
    help_backend = f"{', '.join(BACKENDS)} (naive, to compare)"
    add("--backend", metavar="NAME", choices=BACKENDS, default="auto", help=help_backend)
    add("--resume", action="store_true", help="continue the run under --output")
    add("--stop-after", metavar="N", type=cli.whole_number, help="cut the run after step N; --resume goes on")
    add("--overwrite", action="store_true", help="replace the run under --output")
    add("--report-to", metavar="NAMES", help="trackers: tensorboard, wandb, csv; or none")
    cli.add_import_flag(command)
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="set any recipe key")

    course = command.add_hidden_group("rare flags and the course's", "--help-course")
    add = course.add_argument
    add("--id", metavar="COLUMN", help="--data FILE: names of rows (default: line numbers)")
    add_flag(course, dropout)
    add("--option", choices=tuple(COURSE_OPTIONS), help="pretrain: heads, lr 1e-3; finetune: everything, lr 1e-5")
    add("--hidden_dropout_prob", metavar="P", type=float, help="dropout of the heads, as in the course's scripts")
    add("--use_gpu", action="store_true", help="--device cuda")
    for flag in RECIPE_FLAGS:
        for name in flag.also:
            add_flag(course, replace(flag, name=name, help=flag.name))
    for (short, dataset), split in itertools.product(COURSE_DATASETS.items(), ("train", "dev", "test")):
        name, key = f"--{short}_{split}", f"data.files.{dataset}.{split}"
        add(name, metavar="FILE", dest=key, help=f"{split} file of {dataset}")
        if split != "train":
            add(f"{name}_out", metavar="FILE", type=Path, help=f"copy of {dataset}'s {split} predictions")
    return command


def add_flag(group: argparse._ActionsContainer, flag: Flag) -> None:
    """Adds a recipe flag with the type and choices of its field, without `| None`."""
    hint: Any = Recipe
    for name in flag.key.split("."):
        hint = field_types(hint)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    options: dict[str, Any] = {"dest": flag.key, "default": None, "help": flag.help.replace("%", "%%")}
    if hint is bool:
        group.add_argument(flag.name, action="store_const", const=True, **options)
    elif typing.get_origin(hint) is typing.Literal:
        options["help"] += f": {', '.join(typing.get_args(hint))}"
        group.add_argument(flag.name, choices=typing.get_args(hint), metavar=flag.metavar, **options)
    else:
        assert hint in (int, float, str), f"{flag.key}: no flag for {hint}"
        group.add_argument(flag.name, type=hint, metavar=flag.metavar, **options)


def build_recipe(chosen: argparse.Namespace) -> Recipe:
    """The recipe with the values of the course's --option, then of the flags, then of --set.

    --option without --recipe trains `course`, which has the defaults of the course's scripts. --resume starts from the
    recipe saved under --output, unless the command line names one.
    """
    values: dict[str, Any] = dict(COURSE_OPTIONS[chosen.option]) if chosen.option else {}
    for key, value in vars(chosen).items():
        if "." in key and value is not None:  # the flag sets this key of the recipe
            for part in reversed(key.split(".")):
                value = {part: value}
            values = merge(values, value)
    values = merge(values, one_file(chosen))
    assigned = parse_assignments(chosen.assignments)
    if chosen.imports:
        values["imports"] = Whole(chosen.imports)
    # The learning rate of `default` suits pre-trained weights; the tiny model has random ones.
    model = merge(values, assigned).get("model", {}).get("name")
    name = chosen.recipe or ("course" if chosen.option else "default" if model else "demonstration")
    if chosen.resume and chosen.recipe is None:
        saved = saved_recipe_path(chosen.output or Path())
        name = str(saved) if saved.is_file() else name
    recipe = Recipe.load(name).with_values(values, "command line")
    if chosen.hidden_dropout_prob is not None:
        recipe = with_dropout_of_heads(recipe, chosen.hidden_dropout_prob)
    recipe = recipe.with_values(assigned, "command line")
    report_kept(recipe, merge(values, assigned))
    check_places(recipe)
    return recipe if chosen.tasks is None or chosen.text is not None else only_tasks(recipe, chosen.tasks.split(","))


def report_kept(recipe: Recipe, values: Mapping[str, Any]) -> None:
    """Prints a line for each of the command line's values that a stage replaces with its own."""
    stages = [flatten(stage) for stage in recipe.stages]
    for key, value in flatten(values).items():
        for number, own in enumerate(stages, start=1):
            if own.get(key, value) != value:
                print(f"stage {number} does not use {key} = {value}: it sets {own[key]} itself")


def with_dropout_of_heads(recipe: Recipe, dropout: float) -> Recipe:
    """The recipe with this dropout in every head that has one, those of tasks that only a stage trains included."""

    def changed(tasks: Mapping[str, Any], inherited: Collection[str] = ()) -> dict[str, Any]:
        values = {name: dict(options) for name, options in tasks.items()}
        for name, options in values.items():
            own = name not in inherited or "dropout" in options  # a stage's task has the recipe's, else its own
            guessed = not options.get("kind", name)  # the labels will decide; each of these kinds has a dropout
            if own and (guessed or hasattr(build_task(name, options).options, "dropout")):
                options["dropout"] = dropout
        return values

    stages = [{**s, "tasks": changed(s["tasks"], recipe.tasks)} if "tasks" in s else s for s in recipe.stages]
    return recipe.with_values({"tasks": changed(recipe.tasks), "stages": stages}, "--hidden_dropout_prob")


def one_file(chosen: argparse.Namespace) -> dict[str, Any]:
    """The values of a recipe with the one task that `--data FILE --text COLUMN --label COLUMN` describes.

    The task is called as --tasks says, else like the label column or the file. Without --kind its `kind` is empty: the
    labels decide. Raises ConfigError for flags that do not fit together.
    """
    data = vars(chosen)["data.directory"]
    own = {name: getattr(chosen, name) for name in ("text", "label", "kind", "id", "dev")}
    if data is None or not Path(data).is_file():
        for name, value in own.items():
            if value is not None:
                no_file = f", and {data} is no file" if data else ""
                raise ConfigError(f"--{name} {value}: describes --data FILE{no_file}")
        return {}
    if chosen.text is None and ENDINGS.get(Path(data).suffix.lower()) != "text":
        raise ConfigError(f"--data {data}: a file; --text COLUMN names its text and --label COLUMN its labels")
    if chosen.label is None and chosen.kind is None:
        raise ConfigError(f"--data {data}: --label COLUMN names its labels; for text without labels, choose a --kind")
    name = chosen.tasks or task_name(chosen.label or Path(data).stem)
    text = None if chosen.text is None else chosen.text.split(",")
    source = {"train": data, "dev": chosen.dev, "text": text, "label": chosen.label, "id": chosen.id}
    source = {key: value for key, value in source.items() if value is not None}
    task = {"kind": chosen.kind or "", "data": source}
    return {"tasks": Whole({name: task}), "data": {"directory": ""}}


def only_tasks(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with the tasks of these names alone; the name of a kind that it lacks adds a task of this kind."""
    names = [name.strip() for name in names]
    known = build_tasks(recipe)
    for name in names:
        if name not in known:
            try:
                build_task(name)
            except ConfigError:
                raise ConfigError(f"--tasks {name}: recipe {recipe.name} has {', '.join(known)}") from None
    recipe = recipe.with_values({"tasks": {name: {} for name in names if name not in known}}, "--tasks")
    return without_tasks(recipe, [name for name in known if name not in names], print)


def check_places(recipe: Recipe) -> None:
    """Raises ConfigError, naming the likely right path, if --data holds a model instead of data."""
    data, model = Path(recipe.data.directory), Path(recipe.model.name)
    if not recipe.data.directory or not data.is_dir() or any(data.glob("*.[ct]sv")):
        return
    trained = next((d for d in (data, data / "best") if any((d / name).is_file() for name in MODEL_FILES)), None)
    if trained is not None:
        swapped = f"; did you mean --data {model} --model {trained}?" if recipe.model.name and model.is_dir() else ""
        raise ConfigError(f"--data {data}: holds a model and no data files{swapped or f'; --model {trained} uses it'}")


def build_options(chosen: argparse.Namespace, arguments: Sequence[str]) -> Options:
    """The settings of the run. Raises ConfigError for flags that contradict each other."""
    if chosen.use_gpu and chosen.device == "cpu":
        raise ConfigError("--use_gpu and --device cpu: choose one")
    if chosen.resume and chosen.overwrite:
        raise ConfigError("--resume and --overwrite: choose one")
    if chosen.resume and chosen.output is None:
        raise ConfigError("--resume needs --output, the directory of the interrupted run")
    if chosen.resume and os.environ.get("RANK", "0") == "0":  # other machines may lack the run's files
        require_run(chosen.output)
    trackers = None if chosen.report_to is None else tuple(chosen.report_to.split(","))
    trackers = () if trackers == ("none",) else trackers
    course = itertools.product(COURSE_DATASETS.items(), ("dev", "test"))
    copies = {(dataset, split): getattr(chosen, f"{short}_{split}_out") for (short, dataset), split in course}
    return Options(
        output=chosen.output,
        device="cuda" if chosen.use_gpu else chosen.device,
        backend=chosen.backend,
        resume=chosen.resume,
        overwrite=chosen.overwrite,
        stop_after=chosen.stop_after,
        copies={key: path for key, path in copies.items() if path is not None},
        report_to=trackers,
        command=shlex.join(["python", "-m", "minbert_fast.train", *arguments]),
    )


def main(arguments: Sequence[str]) -> None:
    """Trains. Raises ConfigError, DataError, RunError or OSError for mistakes of the user and failures of the run."""
    chosen = parser().parse_args(arguments)
    options = build_options(chosen, arguments)
    train(build_recipe(chosen), options)


if __name__ == "__main__":
    sys.exit(cli.run(main))
