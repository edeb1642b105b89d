# SPDX-License-Identifier: Apache-2.0
"""Trains a multitask model.

    python -m minbert_fast.train                                          the demonstration: sample data, a tiny model
    python -m minbert_fast.train --data DIR --model DIR --output DIR      your data, your weights
    python -m minbert_fast.train --resume --output DIR                    continues the interrupted run in DIR
    python -m minbert_fast.train --recipe NAME --set optimizer.lr=1e-5    an experiment with one value changed

--set overrides flags, and flags override the recipe. The flags of the course's own scripts work too.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError, merge
from minbert_fast.recipes.recipe import Recipe, parse_assignments
from minbert_fast.reporting.runs import flatten
from minbert_fast.trainer.job import Options, train
from minbert_fast.trainer.outputs import saved_recipe_path


@dataclass(frozen=True)
class Flag:
    """A flag that sets one value of the recipe and takes its type and choices from the recipe's field."""

    key: str  # section.field
    names: tuple[str, ...]
    metavar: str
    help: str


RECIPE_FLAGS = (
    Flag("data.directory", ("--data",), "DIR", "directory with data files in the course's layout"),
    Flag("model.name", ("--model",), "DIR|HUB_NAME", "encoder weights: a directory, a hub name or a course .pt file"),
    Flag("model.dropout", ("--dropout", "--hidden_dropout_prob"), "P", "dropout of the encoder"),
    Flag("training.epochs", ("--epochs",), "N", "passes over the data"),
    Flag("training.max_steps", ("--max-steps", "--max_steps"), "N", "most steps of the run, with all resumed parts"),
    Flag("training.batch_size", ("--batch-size", "--batch_size"), "N", "examples per task and step"),
    Flag("training.seed", ("--seed",), "N", "seed of all random numbers"),
    Flag("training.precision", ("--precision",), "", "precision of matrix products; weights and moments stay fp32"),
    Flag("optimizer.lr", ("--lr",), "F", "learning rate (--option pretrain: 1e-3, finetune: 1e-5)"),
    Flag("surgery.method", ("--surgery",), "NAME", "method against conflicting gradients: none, pcgrad, ..."),
)

# The course's short names of its data files, and our names of the datasets.
COURSE_DATASETS = {"sst": "sentiment", "para": "paraphrase", "sts": "similarity"}
COURSE_OPTIONS: Mapping[str, dict[str, Any]] = {
    "pretrain": {"model": {"freeze": True}, "optimizer": {"lr": 1e-3}},
    "finetune": {"model": {"freeze": False}, "optimizer": {"lr": 1e-5}},
}


def parser() -> argparse.ArgumentParser:
    """The command's flags: those of the run, of the recipe, and of the course."""
    command = cli.Parser("train", __doc__ or "")
    add = command.add_argument_group("the run").add_argument
    add("--recipe", metavar="NAME|FILE.toml", help="the experiment (default: default; without --model: demonstration)")
    add("--output", metavar="DIR", type=Path, help="directory of the results (default: a new one under runs/)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--backend",
        choices=("auto", "fast", "reference"),
        default="auto",
        help="reference: padded, eager, one backward per task, as in a course project",
    )
    add("--resume", action="store_true", help="continue the run under --output from its newest checkpoint")
    add("--overwrite", action="store_true", help="replace an earlier run under --output")
    add(
        "--report-to",
        default="none",
        metavar="NAMES",
        help="also send the records to trackers: tensorboard, wandb, csv, separated by commas (default: none)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="set any value of the recipe, such as checkpoint.every=100 (repeatable)",
    )
    values = command.add_argument_group("the recipe's values")
    for flag in RECIPE_FLAGS:
        add_flag(values, flag)
    add = command.add_argument_group("the course's flags").add_argument
    add("--option", choices=tuple(COURSE_OPTIONS), help="pretrain: heads only; finetune: everything")
    add("--use_gpu", action="store_true", help="--device cuda")
    for (short, dataset), split in itertools.product(COURSE_DATASETS.items(), ("train", "dev", "test")):
        name, key = f"--{short}_{split}", f"data.files.{dataset}.{split}"
        add(name, metavar="FILE", dest=key, help=f"{split} file of {dataset}")
        if split != "train":
            add(f"{name}_out", metavar="FILE", type=Path, help=f"copy of {dataset}'s {split} predictions")
    return command


def add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    """Adds a recipe flag with the type and choices of its field, without `| None`."""
    hint: Any = Recipe
    for name in flag.key.split("."):
        hint = typing.get_type_hints(hint)[name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = (option for option in typing.get_args(hint) if option is not type(None))
    options: dict[str, Any] = {"dest": flag.key, "default": None, "help": flag.help.replace("%", "%%")}
    if typing.get_origin(hint) is typing.Literal:
        group.add_argument(*flag.names, choices=typing.get_args(hint), **options)
    else:
        assert hint in (int, float, str), f"{flag.key}: no flag for {hint}"
        group.add_argument(*flag.names, type=hint, metavar=flag.metavar, **options)


def build_recipe(chosen: argparse.Namespace) -> Recipe:
    """The recipe with the values of the course's --option, then of the flags, then of --set.

    --resume uses the recipe saved under --output, unless the command line names one or changes more than --max-steps.
    """
    values: dict[str, Any] = dict(COURSE_OPTIONS[chosen.option]) if chosen.option else {}
    for key, value in vars(chosen).items():
        if "." in key and value is not None:  # the flag sets this key of the recipe
            for part in reversed(key.split(".")):
                value = {part: value}
            values = merge(values, value)
    values = merge(values, parse_assignments(chosen.assignments))
    if chosen.resume and chosen.recipe is None and flatten(values).keys() <= {"training.max_steps"}:
        saved = saved_recipe_path(chosen.output or Path())
        if saved.is_file():
            return Recipe.load(str(saved)).with_values(values, "command line")
    # The learning rate of `default` suits pre-trained weights; the tiny model has random ones.
    default = "default" if values.get("model", {}).get("name") else "demonstration"
    return Recipe.load(chosen.recipe or default).with_values(values, "command line")


def build_options(chosen: argparse.Namespace, arguments: Sequence[str]) -> Options:
    """The settings of the run. Raises ConfigError for flags that contradict each other."""
    if chosen.use_gpu and chosen.device == "cpu":
        raise ConfigError("--use_gpu and --device cpu: choose one")
    if chosen.resume and chosen.overwrite:
        raise ConfigError("--resume and --overwrite: choose one")
    if chosen.resume and chosen.output is None:
        raise ConfigError("--resume needs --output, the directory of the interrupted run")
    course = itertools.product(COURSE_DATASETS.items(), ("dev", "test"))
    copies = {(dataset, split): getattr(chosen, f"{short}_{split}_out") for (short, dataset), split in course}
    return Options(
        output=chosen.output,
        device="cuda" if chosen.use_gpu else chosen.device,
        backend=chosen.backend,
        resume=chosen.resume,
        overwrite=chosen.overwrite,
        copies={key: path for key, path in copies.items() if path is not None},
        report_to=() if chosen.report_to == "none" else tuple(chosen.report_to.split(",")),
        command=shlex.join(["python", "-m", "minbert_fast.train", *arguments]),
    )


def main(arguments: Sequence[str]) -> None:
    """Trains. Raises ConfigError, DataError, RunError or OSError for mistakes of the user and failures of the run."""
    chosen = parser().parse_args(arguments)
    train(build_recipe(chosen), build_options(chosen, arguments))


if __name__ == "__main__":
    sys.exit(cli.run(main))
