# SPDX-License-Identifier: Apache-2.0
"""Writes a trained model's predictions for a data file.

python -m minbert_fast.predict --checkpoint runs/first/best --task sentiment --input FILE --output sst-test-output.csv
python -m minbert_fast.predict --checkpoint runs/first/best --task similarity --input FILE --output pairs.jsonl

The input is a file in the course's layout; labels are ignored. The output has the course's prediction format, or, if its
name ends in .jsonl, one JSON object per row, with the probabilities of the classes for a classification task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from minbert_fast.common.cli import Parser, add_device_flags, add_import_flag, run
from minbert_fast.common.storage import is_stream, whole_file
from minbert_fast.data.files import Table, open_rows
from minbert_fast.data.inputs import file_input
from minbert_fast.tasks import Task
from minbert_fast.tasks.predictions import header_line, row_line
from minbert_fast.tasks.predictor import Predictions, Predictor

MAX_BAD_ROWS = 0.01  # a file with a larger share of unreadable rows is refused


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = Parser("predict", __doc__ or "")
    flags.add_argument("--checkpoint", required=True, metavar="DIR", help="a trained model: best/ or last/")
    flags.add_argument(
        "--task",
        required=True,
        metavar="NAME",
        help="sentiment, paraphrase, similarity, or another of the model's tasks",
    )
    flags.add_argument("--input", type=Path, required=True, metavar="FILE", help="a data file of that task")
    flags.add_argument("--output", type=Path, required=True, metavar="FILE", help="the prediction file")
    flags.add_argument(
        "--format",
        choices=("course", "jsonl"),
        help="format of the output (default: jsonl for a .jsonl file, else course)",
    )
    add_import_flag(flags)
    add_device_flags(flags)
    return flags


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises ConfigError, DataError or OSError for mistakes of the user."""
    options = parser().parse_args(arguments)
    model = Predictor.from_pretrained(
        options.checkpoint, device=options.device, precision=options.precision, local_files_only=True
    )
    name = model.task_of(options.task)
    task = model.tasks[name]
    source = file_input(options.input, task.layout)
    form = options.format or ("jsonl" if options.output.suffix == ".jsonl" else "course")
    count = left_out = 0
    with (
        open_rows(source, None, max_bad_rows=MAX_BAD_ROWS) as reader,
        whole_file(options.output) as file,
        tqdm(unit=" examples", file=sys.stderr, disable=None, leave=False) as bar,
    ):
        if form == "course":
            file.write(header_line(task.header).encode())
        for table in reader.chunks():
            for bad in table.bad_rows:
                tqdm.write(f"left out: {bad}", file=sys.stderr)
            found = model.predict_table(name, table, bar.update)
            course = map(row_line, table.ids, found.values.tolist())
            lines = course if form == "course" else _json_lines(table, found, task)
            file.write("".join(lines).encode("utf-8"))
            count += len(table)
            left_out += len(table.bad_rows)
    total = f"{options.output}: {count:,} predictions" + (f", {left_out:,} rows left out" if left_out else "")
    print(total, file=sys.stderr if is_stream(options.output) else sys.stdout)


def _json_lines(table: Table, found: Predictions, task: Task) -> Iterator[str]:
    """One JSON object per row: id, prediction, and for a classification the class name and all probabilities."""
    names = task.class_names
    for row, (identity, value) in enumerate(zip(table.ids, found.values.tolist(), strict=True)):
        one: dict[str, object] = {"id": identity, "prediction": value}
        if names is not None and found.probabilities is not None:
            one["class"] = names[int(value)]
            shares = found.probabilities[row].tolist()
            one["probabilities"] = {name: round(share, 6) for name, share in zip(names, shares, strict=True)}
        yield json.dumps(one, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(run(main))
