# SPDX-License-Identifier: Apache-2.0
"""`--report-to`: copies of a run's records in TensorBoard, Weights & Biases or a CSV file while it runs.

metrics.jsonl remains the record of the run. A tracker that fails (no network, a full disk) is dropped with a warning, and
training goes on.
"""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from minbert_fast.common.errors import RunError, first_line
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import csv_lines, write_text
from minbert_fast.reporting.runs import numbers

CSV, TENSORBOARD, WANDB_ID = "metrics.csv", "tensorboard", ".wandb-id"
KNOWN = ("tensorboard", "wandb", "csv")
Record = Mapping[str, Any]


class Tracker(Protocol):
    """A destination of complete records, one per step, steps ascending."""

    def write(self, record: Record) -> None: ...
    def close(self) -> None: ...


class CsvTracker:
    """metrics.csv: one row per record and one column per key, rewritten at every evaluation and at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, record: Record) -> None:
        if any(key.startswith("dev/") for key in record):
            self.close()

    def close(self) -> None:
        lines = (self._directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        columns = list(dict.fromkeys(key for record in records for key in record))
        rows = [[record.get(column) for column in columns] for record in records]
        write_text(self._directory / CSV, csv_lines([columns, *rows]))


class TensorBoardTracker:
    """Event files under tensorboard/. A resumed run hides the events from `first_step` on."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / TENSORBOARD), purge_step=first_step or None)

    def write(self, record: Record) -> None:
        for key, value in _numbers(record).items():
            self._writer.add_scalar(key, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run of project minbert_fast, named after the directory. Resuming continues the same run."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = directory / WANDB_ID
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project="minbert_fast",
            name=directory.resolve().name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )

    def write(self, record: Record) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """Passes each step's record to all trackers once, when the next step's record arrives: until then it may change."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._held: Record | None = None

    def __call__(self, record: Record | None) -> None:
        """Takes the record of a new step, a replacement for the last one, or None after the last record."""
        held, self._held = self._held, record
        if held is not None and (record is None or held["step"] != record["step"]):
            self._each(lambda tracker: tracker.write(held))

    def close(self) -> None:
        """Passes on the last record and closes the trackers."""
        self(None)
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # clients of services raise errors of any class
                self._trackers.remove(tracker)
                words = f"{type(tracker).__name__} failed ({first_line(error)}) and gets no more records"
                warnings.warn(words, stacklevel=2)


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for an unknown name, or one whose package is not installed."""
    for name in names:
        if name not in KNOWN:
            raise ConfigError(f"--report-to {name}: expected none or a comma-separated list of {', '.join(KNOWN)}")
        if name != "csv" and find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: not installed (pip install 'minbert-fast[{name}]')")


def open_trackers(names: Sequence[str], directory: Path, first_step: int, config: Mapping[str, Any]) -> Trackers:
    """Starts the named trackers of a run that begins after `first_step`.

    `config` holds the recipe's values by flat key. Raises RunError if a tracker cannot start.
    """
    return Trackers([_start(name, directory, first_step, config) for name in names])


def _start(name: str, directory: Path, first_step: int, config: Mapping[str, Any]) -> Tracker:
    try:
        if name == "csv":
            return CsvTracker(directory)
        return TensorBoardTracker(directory, first_step) if name == "tensorboard" else WandbTracker(directory, config)
    except Exception as error:  # clients of services raise errors of any class: no login, no network, a broken install
        raise RunError(f"--report-to {name}: cannot start ({first_line(error)})") from error


def _numbers(record: Record) -> dict[str, float]:
    """The record's numeric values, without the step."""
    return {key: value for key, value in numbers(record).items() if key != "step"}
