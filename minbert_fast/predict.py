# SPDX-License-Identifier: Apache-2.0
"""Writes a trained model's predictions for a file.

  minbert-fast predict --checkpoint runs/first/best --task topic --input news.jsonl --output topics.csv --probabilities
  ... | minbert-fast predict --checkpoint runs/first/best --task topic --input - --text body --output -
  minbert-fast predict --checkpoint runs/first/best --task sentiment --input FILE --output sst-test-output.csv

The input needs no labels; - is standard input. Formats of the output: csv (id, prediction), jsonl (one object per row),
course (the course's graders). The default is jsonl for .jsonl, .ndjson and .json, course for a file in the course's
layout, else csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minbert_fast.common.cli import Parser, add_device_flags, add_import_flag, run
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import csv_lines, is_stream, whole_file
from minbert_fast.data.files import TableReader
from minbert_fast.data.inputs import ENDINGS, find_input, layout_of
from minbert_fast.data.readers.lines import TextRecords
from minbert_fast.data.source import Source
from minbert_fast.tasks import Task
from minbert_fast.tasks.inference.predictions import header_line, row_line
from minbert_fast.tasks.inference.predictor import Predictor


def parser() -> argparse.ArgumentParser:
    flags = Parser("predict", __doc__ or "")
    add = flags.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a trained model: best/ or last/")
    add("--task", metavar="NAME", help="one of the model's tasks (default: the only one)")
    add("--input", type=Path, required=True, metavar="FILE", help="CSV, TSV, JSON lines, Parquet, or -")
    add("--text", metavar="COLUMNS", help="columns of text: NAME or NAME,NAME (default: those of the training file)")
    names = "column with the names of rows (default: the training file's; with --text line numbers)"
    add("--id", metavar="COLUMN", help=names)
    add("--output", type=Path, required=True, metavar="FILE", help="the prediction file, or -")
    add("--format", choices=("csv", "jsonl", "course"), help="of the output (default: see above)")
    add("--probabilities", action="store_true", help="csv, jsonl: also write the probability of each class")
    add_import_flag(flags)
    add_device_flags(flags)
    return flags


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    model = Predictor.from_pretrained(
        options.checkpoint, device=options.device, precision=options.precision, local_files_only=True
    )
    if options.task is None and len(model.tasks) != 1:
        raise ConfigError(f"--task: expected one of {', '.join(model.tasks)}")
    name = next(iter(model.tasks)) if options.task is None else model.task_of(options.task)
    task = model.tasks[name]
    columns = tuple(options.text.split(",")) if options.text else ()
    names = (task.class_names or ()) if options.probabilities else ()
    if options.probabilities and not names:
        raise ConfigError(f"--probabilities: task {task.name} has no classes")
    form = options.format or format_of_output(options.output, course=bool(task.layout and not (columns or names)))
    if names and form == "course":
        raise ConfigError("--format course: has no place for --probabilities; choose csv or jsonl")
    if options.output.is_file() and options.input.is_file() and options.output.samefile(options.input):
        raise ConfigError(f"--output {options.output}: is the file of --input, which the predictions would replace")
    count = left_out = 0
    with (
        open_input(options.input, task, columns, options.id or "") as reader,
        whole_file(options.output) as file,
        tqdm(unit=" examples", file=sys.stderr, disable=None, leave=False) as bar,
    ):
        if form == "course":
            file.write(header_line(task.header).encode())
        elif form == "csv":
            file.write(csv_lines([("id", "prediction", *(f"probability_{name}" for name in names))]).encode())
        for table in reader.chunks():
            for bad in table.bad_rows:
                tqdm.write(f"left out: {bad}", file=sys.stderr)
            found = model.predict_table(name, table, bar.update)
            labels = task.as_labels(found.values)
            shares = found.probabilities.tolist() if names and found.probabilities is not None else [()] * len(labels)
            rows = zip(table.ids, labels, shares, strict=True)
            if form == "course":
                text = "".join(row_line(identity, label) for identity, label, _ in rows)
            elif form == "csv":
                text = csv_lines((i, label, *(f"{share:.6g}" for share in row)) for i, label, row in rows)
            else:
                text = "".join(json_line(*row, names) for row in rows)
            file.write(text.encode("utf-8"))
            count += len(table)
            left_out += len(table.bad_rows)
    total = f"{options.output}: {count:,} predictions" + (f", {left_out:,} rows left out" if left_out else "")
    total += f", {model.truncated:,} rows cut to {model.max_length} tokens" if model.truncated else ""
    print(total, file=sys.stderr if is_stream(options.output) else sys.stdout)


def format_of_output(path: Path, course: bool) -> str:
    """The format of a prediction file by its ending: JSON lines, else the course's format or CSV.

    Raises ConfigError for an ending that names another format.
    """
    ending = ENDINGS.get(path.suffix.lower())
    if ending in ("tsv", "parquet"):
        raise ConfigError(
            f"--output {path}: predictions are CSV or JSON lines; choose a name that ends in .csv or .jsonl, or a --format"
        )
    return "jsonl" if ending == "jsonl" else "course" if course else "csv"


def open_input(path: Path, task: Task, columns: tuple[str, ...], identity: str) -> TableReader:
    """Opens a file to predict: read as the task's training data, unless `columns` or the file's ending say otherwise."""
    source = next(iter(task.sources), Source())
    ending = path.suffix.lower()
    if ENDINGS.get(ending) == "text" and not columns and task.num_texts == 1:
        source = Source(text=TextRecords.names)  # whatever the columns of the training file
    elif columns or (task.layout and ending not in (".csv", ".tsv")):  # no file in the course's layout
        source = Source(text=columns or layout_of(source).texts)
    form = "auto" if ending in ENDINGS else source.format
    source = replace(
        source, train=str(path), dev="", test="", hub="", config="", format=form, label="", values={}, skip=()
    )
    found = find_input(replace(source, id=identity or source.id), "train", task.num_texts)
    assert found is not None, "the source names a file"
    return TableReader(found, None)


def json_line(identity: str, label: Any, shares: Sequence[float], names: Sequence[str]) -> str:
    """A JSON object: id, prediction and, with `names`, the probability of each class."""
    one: dict[str, Any] = {"id": identity, "prediction": label}
    if names:
        one["probabilities"] = {name: round(share, 6) for name, share in zip(names, shares, strict=True)}
    return json.dumps(one, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(run(main))
