# SPDX-License-Identifier: Apache-2.0
"""A part of the sample data, flags for a whole run in one or two seconds, and what a run has written."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast.data import sample_directory

TRAIN_ROWS, DEV_ROWS = 40, 24
MODEL_FILES = ("last/model.safetensors", "last/heads.safetensors", "best/model.safetensors", "best/heads.safetensors")
#: Empty, long, of other scripts, with control characters and line ends that are none.
ODD_TEXTS = (
    "",
    " ",
    "word " * 10_000,
    "😀 👩‍👩‍👧",
    "שלום עולם",
    "مرحبا",
    "\x01\x1b[31m\x7f",
    "a\u2028b\x85c\x0bd\x0ce\x1ef",
    "\ufeff",
    "a" * 50_000,
)
FILES = {stem: f"{stem}-{{}}.csv" for stem in ("ids-sst", "quora", "sts")}


def small_data(folder: Path, train_rows: int = TRAIN_ROWS) -> Path:
    """The first rows of the sample data, in the course's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in FILES.values():
        for split, rows in (("train", train_rows), ("dev", DEV_ROWS)):
            name = pattern.format(split)
            with (sample_directory().data / name).open(encoding="utf-8") as source:
                (folder / name).write_text("".join(islice(source, rows + 1)), encoding="utf-8")
    return folder


def read_records(output: Path) -> list[dict[str, Any]]:
    """The records of the run under `output`."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error, which must be one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def read_predictions(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids and values (fp64) of a prediction file in the course's format."""
    rows = [line.rpartition(" , ") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [row[0] for row in rows], np.array([float(row[2]) for row in rows])


def small_run(data: Path, output: Path, *more: str) -> list[str]:
    """Flags of a run on `data`: 8 examples per task, 5 steps per epoch, fp32, one log line per step."""
    flags = ["--data", str(data), "--output", str(output), "--device", "cpu", "--precision", "fp32"]
    flags += ["--batch-size", "8", "--epochs", "2", "--set", "logging.every=1"]
    return [*flags, "--set", f"data.cache={data / 'cache'}", *more]
