# SPDX-License-Identifier: Apache-2.0
"""Scores of a trained model on labelled files.

python -m minbert_fast.evaluate --checkpoint runs/first/best --data DIR [--split dev]
python -m minbert_fast.evaluate --checkpoint runs/first/best --sentiment FILE --similarity FILE --json scores.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minbert_fast.common.cli import Parser, run
from minbert_fast.common.device import choose_device, choose_precision
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.cache import load_tokens
from minbert_fast.data.files import read_table
from minbert_fast.data.formats import MAIN_TASKS, find_tables
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel
from minbert_fast.tasks.evaluation import Evaluation, evaluate
from minbert_fast.tasks.predictions import write_text


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = Parser("evaluate", "Scores of a trained model on labelled data files.")
    flags.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a trained model: best/ or last/")
    flags.add_argument("--data", type=Path, metavar="DIR", help="data directory with the course's files")
    flags.add_argument("--split", default="dev", help="which files of --data: train, dev or test (default: dev)")
    for kind in MAIN_TASKS:
        flags.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"a {kind} file, instead of --data")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the scores here")
    flags.add_argument("--output", type=Path, metavar="DIR", help="write prediction files and details.json here")
    flags.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    flags.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default: auto)")
    return flags


def main(arguments: Sequence[str]) -> None:
    """Runs the command; raises ConfigError, DataError or OSError for what the user can mend."""
    options = parser().parse_args(arguments)
    files = {kind: getattr(options, kind) for kind in MAIN_TASKS if getattr(options, kind) is not None}
    if (options.data is None) == (not files):
        raise ConfigError("expected either --data DIR or files (--sentiment, --paraphrase, --similarity)")
    device = choose_device(options.device)
    model = MultitaskModel.load(options.checkpoint).to(device)
    recipe = Recipe.load(str(options.checkpoint / "recipe.toml"))
    paths = _paths_in(options.data, options.split, model) if options.data else _paths_given(files, model)

    tokenizer = Tokenizer.from_pretrained(options.checkpoint)
    bad_rows = recipe.data.max_bad_rows
    tables = {name: _table(model, name, path, tokenizer, bad_rows) for name, path in paths.items()}
    rows = sum(map(len, tables.values()))
    with tqdm(total=rows, unit=" examples", file=sys.stderr, disable=None, leave=False) as bar:
        evaluation = evaluate(
            model,
            tables,
            precision=choose_precision(options.precision, device),
            max_length=recipe.data.max_length,
            progress=bar.update,
        )
    if options.output is not None:
        texts = {
            name: read_table(path, model.tasks[name].dataset, max_bad_rows=bad_rows).sentences
            for name, path in paths.items()
        }
        evaluation.write(options.output, texts, options.split)
    if options.json is not None:
        scores = {key: value if math.isfinite(value) else None for key, value in evaluation.metrics.items()}
        write_text(options.json, json.dumps(scores, indent=2) + "\n")
    print(shown(evaluation, tables))


def shown(evaluation: Evaluation, tables: dict[str, TokenTable]) -> str:
    """The scores as a small table for the terminal."""
    width = max(len(key) for key in evaluation.metrics)
    lines = []
    for name, result in evaluation.tasks.items():
        where = f"  {len(result.predictions):,} examples of {tables[name].path}"
        for key, value in result.metrics.items():
            lines.append(f"{key:<{width}}  {value:7.4f}{where}")
            where = ""
    kinds = {result.task.dataset for result in evaluation.tasks.values()}
    part = "" if set(MAIN_TASKS) <= kinds else f"  of {', '.join(evaluation.tasks)} alone"
    lines.append(f"{'score':<{width}}  {evaluation.score:7.4f}{part}")
    return "\n".join(lines)


def _table(model: MultitaskModel, name: str, path: Path, tokenizer: Tokenizer, bad_rows: float) -> TokenTable:
    table = load_tokens(path, model.tasks[name].dataset, tokenizer, max_bad_rows=bad_rows)
    for bad in table.bad_rows:
        print(f"left out: {bad}", file=sys.stderr)
    return table


def _paths_in(directory: Path, split: str, model: MultitaskModel) -> dict[str, Path]:
    """The files of the model's tasks in a data directory, by task name."""
    datasets = tuple(dict.fromkeys(task.dataset for task in model.tasks.values() if task.predicts))
    found = find_tables(directory, split, datasets)
    for notice in found.notices:
        print(notice, file=sys.stderr)
    return {name: found.paths[task.dataset] for name, task in model.tasks.items() if task.dataset in found.paths}


def _paths_given(files: dict[str, Path], model: MultitaskModel) -> dict[str, Path]:
    """Files given by kind, by name of the task that has such data: the one of that name, else the first."""
    paths = {}
    for kind, path in files.items():
        names = [name for name, task in model.tasks.items() if task.dataset == kind]
        if not names:
            raise ConfigError(f"--{kind}: this model has no {kind} head (it has {', '.join(model.tasks)})")
        paths[kind if kind in names else names[0]] = path
    return paths


if __name__ == "__main__":
    sys.exit(run(main))
