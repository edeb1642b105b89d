# SPDX-License-Identifier: Apache-2.0
"""A part of the sample data, and flags for a whole run in one or two seconds."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from minbert_fast.data import sample_directory

TRAIN_ROWS, DEV_ROWS = 40, 24
FILES = {stem: f"{stem}-{{}}.csv" for stem in ("ids-sst", "quora", "sts")}


def small_data(folder: Path) -> Path:
    """The first rows of the sample data, in the course's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in FILES.values():
        for split, rows in (("train", TRAIN_ROWS), ("dev", DEV_ROWS)):
            name = pattern.format(split)
            with (sample_directory().data / name).open(encoding="utf-8") as source:
                (folder / name).write_text("".join(islice(source, rows + 1)), encoding="utf-8")
    return folder


def small_run(data: Path, output: Path, *more: str) -> list[str]:
    """Flags of a run on `data` in fp32: 8 examples per task, so 5 steps per epoch; one log line per step."""
    flags = [
        "--data",
        str(data),
        "--output",
        str(output),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch-size",
        "8",
    ]
    return [*flags, "--epochs", "2", "--set", "logging.every=1", "--set", f"data.cache={data / 'cache'}", *more]
