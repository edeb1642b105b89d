# SPDX-License-Identifier: Apache-2.0
"""`--report-to`: a run's records also go to TensorBoard, Weights & Biases or a CSV file, while it runs.

metrics.jsonl stays the record of a run; these are copies for people to watch. One that fails (no network, a full disk) is
given up with a warning: a copy is no reason to lose a training run.
"""

from __future__ import annotations

import csv
import io
import json
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import write_bytes

CSV, TENSORBOARD, WANDB_ID = "metrics.csv", "tensorboard", ".wandb-id"
Record = Mapping[str, Any]


class Tracker(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """A step's record, once and whole, steps ascending."""

    def close(self) -> None:
        """No further record comes."""


class CsvTracker:
    """metrics.csv: a line a record of metrics.jsonl, a column a value; written anew at every evaluation and at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, record: Record) -> None:
        if any(key.startswith("dev/") for key in record):
            self.close()

    def close(self) -> None:
        lines = (self._directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        columns = list(dict.fromkeys(key for record in records for key in record))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(records)
        write_bytes(self._directory / CSV, text.getvalue().encode("utf-8"))


class TensorBoardTracker:
    """Event files under tensorboard/; what a resumed run takes back is hidden there too."""

    def __init__(self, directory: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = first_step if first_step > 0 else None
        self._writer = SummaryWriter(str(directory / TENSORBOARD), purge_step=purge)

    def write(self, record: Record) -> None:
        for key, value in numbers(record).items():
            self._writer.add_scalar(key, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run of project minbert_fast under the directory's name; resuming goes on with the same run."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = directory / WANDB_ID
        if not identity.exists():
            write_bytes(identity, uuid.uuid4().hex[:12].encode())
        self._run = wandb.init(
            project="minbert_fast",
            name=directory.resolve().name,
            id=identity.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )

    def write(self, record: Record) -> None:
        self._run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """Hands each record on once and whole: a step's record may be replaced until the next step's comes."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)
        self._held: Record | None = None

    def __call__(self, record: Record) -> None:
        """Takes the record of a step, or one that replaces the last."""
        if self._held is not None and self._held["step"] != record["step"]:
            self._hand_on()
        self._held = record

    def close(self) -> None:
        """Hands on what is held, and closes."""
        self._hand_on()
        self._each(lambda tracker: tracker.close())

    def _hand_on(self) -> None:
        record, self._held = self._held, None
        if record is not None:
            self._each(lambda tracker: tracker.write(record))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # whatever a service's client raises
                self._trackers.remove(tracker)
                warnings.warn(f"{type(tracker).__name__}: given up ({error or type(error).__name__})", stacklevel=2)


KNOWN = ("tensorboard", "wandb", "csv")


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is not known, or whose package is not installed."""
    for name in names:
        if name not in KNOWN:
            raise ConfigError(f"--report-to {name}: expected none, or some of {', '.join(KNOWN)}, with commas between")
        if name != "csv" and find_spec(name) is None:
            raise ConfigError(f"--report-to {name}: not installed (pip install 'minbert-fast[{name}]')")


@contextmanager
def tracking(
    names: Sequence[str], directory: Path, first_step: int, config: Mapping[str, Any]
) -> Iterator[Callable[[Record], None]]:
    """What takes a run's records and hands them to the trackers of these names, which are closed in the end.

    A run goes on from `first_step` (0: a new one); `config` are the recipe's values. Raises ConfigError as `check`
    does, RunError where one cannot start.
    """
    check(names)
    made = [_start(name, directory, first_step, config) for name in names]
    trackers = Trackers(made)
    try:
        yield trackers
    finally:
        trackers.close()


def _start(name: str, directory: Path, first_step: int, config: Mapping[str, Any]) -> Tracker:
    try:
        match name:
            case "csv":
                return CsvTracker(directory)
            case "tensorboard":
                return TensorBoardTracker(directory, first_step)
            case _:
                return WandbTracker(directory, config)
    except Exception as error:  # whatever a service's client raises: not logged in, no network, a half installation
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"--report-to {name}: cannot start ({reason})") from error


def numbers(record: Record) -> dict[str, float]:
    """The values that can be drawn."""
    drawn = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    drawn.pop("step", None)
    return drawn
