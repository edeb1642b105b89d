# SPDX-License-Identifier: Apache-2.0
"""Scores a trained model on labelled files.

python -m minbert_fast.evaluate --checkpoint runs/first/best                      the dev rows of its run
python -m minbert_fast.evaluate --checkpoint runs/first/best --data DIR [--split dev]
python -m minbert_fast.evaluate --checkpoint runs/first/best --task topic --input more.csv
python -m minbert_fast.evaluate --checkpoint runs/first/best --sentiment FILE --similarity FILE --json scores.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from minbert_fast.common.cli import Parser, add_device_flags, add_import_flag, run
from minbert_fast.common.device import choose_device, choose_precision
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_json
from minbert_fast.data.formats import MAIN_TASKS
from minbert_fast.data.messages import DataError
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel
from minbert_fast.tasks.inference.evaluation import Evaluation, evaluate
from minbert_fast.trainer.datasets import load_split
from minbert_fast.trainer.table_reader import SPLITS, is_in_directory


def parser() -> argparse.ArgumentParser:
    flags = Parser("evaluate", __doc__ or "")
    add = flags.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a trained model: best/ or last/")
    add("--data", type=Path, metavar="DIR", help="directory with the course's files (default: the data of the run)")
    add("--split", default="dev", choices=SPLITS, help="which rows: train, dev or test (default: dev)")
    add("--task", metavar="NAME", help="the task of --input")
    add("--input", type=Path, metavar="FILE", help="a labelled file of --task, with the columns of its training file")
    for kind in MAIN_TASKS:
        add(f"--{kind}", type=Path, metavar="FILE", help=f"a {kind} file, instead of --data")
    add("--json", type=Path, metavar="FILE", help="write the scores here")
    add("--output", type=Path, metavar="DIR", help="write prediction files and details.json here")
    add_import_flag(flags)
    add_device_flags(flags)
    return flags


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    files = {kind: getattr(options, kind) for kind in MAIN_TASKS if getattr(options, kind) is not None}
    if (options.task is None) != (options.input is None):
        raise ConfigError("--task NAME and --input FILE belong together")
    if options.data is not None and (files or options.input):
        raise ConfigError("expected either --data DIR or files")
    device = choose_device(options.device)
    model = MultitaskModel.load(options.checkpoint).to(device)
    recipe = Recipe.load(str(options.checkpoint / "recipe.toml"))
    if options.data is not None:
        if not options.data.is_dir():
            raise DataError(f"--data {options.data}: no such directory")
        if not any(is_in_directory(source) for task in model.tasks.values() for source in task.sources):
            raise ConfigError(
                f"--data {options.data}: every task of this model names its own files; expected --task NAME --input FILE"
            )
        recipe = replace(recipe, data=replace(recipe.data, directory=str(options.data), files={}))
    named = _assign_paths(files, model)
    if options.input is not None:
        if options.task not in model.tasks:
            raise ConfigError(f"--task {options.task}: the model has {', '.join(model.tasks)}")
        if options.task in named:
            raise ConfigError(f"--task {options.task} has two files, {named[options.task]} and {options.input}")
        named[options.task] = options.input
    tokenizer = Tokenizer.from_pretrained(options.checkpoint)
    tables = load_split(recipe, tokenizer, options.split, partial(print, file=sys.stderr), named)
    if not tables:
        directory = recipe.data.directory
        gone = "" if not directory or Path(directory).is_dir() else f"{directory} is no directory: "
        raise DataError(
            f"{gone}no {options.split} rows for any of {', '.join(model.tasks)}; --data DIR or --task and --input"
        )
    precision, max_length = choose_precision(options.precision, device), recipe.data.max_length
    for name, table in tables.items():
        if cut := table.count_truncated(max_length, model.tasks[name].encoder):
            print(f"{table.path}: {cut:,} rows are cut to {max_length} tokens (data.max_length)", file=sys.stderr)
    count = sum(map(len, tables.values()))
    with tqdm(total=count, unit=" examples", file=sys.stderr, disable=None, leave=False) as bar:
        evaluation = evaluate(model, tables, precision=precision, max_length=max_length, progress=bar.update)
    print(format_scores(evaluation, tables), flush=True)  # before the files, which may not be writable
    if options.output is not None:
        evaluation.write(options.output, {name: table.texts() for name, table in tables.items()}, options.split)
    if options.json is not None:
        write_json(options.json, evaluation.metrics)


def format_scores(evaluation: Evaluation, tables: dict[str, TokenTable]) -> str:
    """The scores as a table for the terminal."""
    width = max(len(key) for key in evaluation.metrics)
    lines = []
    for name, result in evaluation.tasks.items():
        where = f"  {len(result.predictions):,} examples of {tables[name].path}"
        for key, value in result.metrics.items():
            lines.append(f"{key:<{width}}  {value:7.4f}{where}")
            where = ""
    kinds = {result.task.layout for result in evaluation.tasks.values()}
    part = "" if set(MAIN_TASKS) <= kinds else f"  of {', '.join(evaluation.scored)} only"
    lines.append(f"{'score':<{width}}  {evaluation.score:7.4f}{part}")
    return "\n".join(lines)


def _assign_paths(files: dict[str, Path], model: MultitaskModel) -> dict[str, Path]:
    """The files (by kind of data) by name of the task that they are for: the task named like the kind, else the first."""
    paths = {}
    for kind, path in files.items():
        names = [name for name, task in model.tasks.items() if task.layout == kind]
        if not names:
            raise ConfigError(f"--{kind}: this model has no {kind} head (it has {', '.join(model.tasks)})")
        paths[kind if kind in names else names[0]] = path
    return paths


if __name__ == "__main__":
    sys.exit(run(main))
