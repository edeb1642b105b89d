# SPDX-License-Identifier: Apache-2.0
"""The files under `--output`: one run at a time, each step once in metrics.jsonl, directories swapped whole."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from minbert_fast.common.errors import RunError, writing
from minbert_fast.common.storage import finite, flush_directory, remove, sweep, write_bytes, write_directory, write_json
from minbert_fast.trainer import trackers

LOCK, METRICS, SUMMARY, CHECKPOINTS = ".lock", "metrics.jsonl", "summary.json", "checkpoints"
RESULTS = ("best", "last", "predictions", "plots", METRICS, SUMMARY, "report.html", CHECKPOINTS)
COPIES = (trackers.CSV, trackers.TENSORBOARD, trackers.WANDB_ID)  # of the records, by --report-to


def fresh_directory(base: Path) -> Path:
    """`base`, or the first of base-2, base-3, ... that does not exist yet."""
    candidate, number = base, 2
    while candidate.exists():
        candidate, number = base.with_name(f"{base.name}-{number}"), number + 1
    return candidate


def own_recipe(output: Path) -> Path:
    """Where a run under `output` keeps its recipe."""
    return output / CHECKPOINTS / "recipe.toml"


class RunDirectory:
    """An output directory held under a lock. Use as a context manager; raises RunError where it cannot be had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.metrics = MetricsLog(path / METRICS)
        self._lock: TextIO | None = None
        self._new = False

    def __enter__(self) -> RunDirectory:
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: cannot be written (it is a file, expected a directory)")
        with writing(self.path):
            self._new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a+")
        try:
            # The kernel gives the lock back when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            self._lock.close()
            raise RunError(f"{self.path}: another run is writing here ({holder}); choose another --output") from None
        with writing(self.path):
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._lock.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        if self._new and not self.used and not self.metrics.has_records:
            remove(self.path)  # nothing came of it
        if self._lock is not None:
            self._lock.close()

    @property
    def used(self) -> bool:
        """Whether a run has left something here that another one must not overwrite unasked."""
        kept = set(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else set()
        return bool(kept - {own_recipe(self.path)}) or any(
            (self.path / name).exists() for name in (SUMMARY, "best", "last")
        )

    def clear(self) -> None:
        """Removes an earlier run's results, nothing else."""
        with writing(self.path):
            for name in (*RESULTS, *COPIES):
                remove(self.path / name)

    def prepare(self) -> None:
        """Puts right what a crash left half done and makes the folders."""
        with writing(self.path):
            self.checkpoints.mkdir(exist_ok=True)
            sweep(self.path)
            sweep(self.checkpoints)
            flush_directory(self.path)

    def write_directory(self, name: str, fill: Callable[[Path], None]) -> None:
        """Replaces the directory `name` whole by what `fill` writes."""
        with writing(self.path / name):
            write_directory(self.path / name, fill)

    def write_recipe(self, toml: str) -> None:
        """Keeps the run's recipe beside its checkpoints, for those who go on with it."""
        path = own_recipe(self.path)
        with writing(path):
            write_bytes(path, toml.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file whole."""
        with writing(self.path / name):
            write_json(self.path / name, value)

    def set_aside(self, *names: str) -> None:
        """Keeps directories for `bring_back`, before they are replaced by something a resumed run must not see."""
        with writing(self.checkpoints):
            for name in names:
                if (self.path / name).exists():
                    remove(self.checkpoints / name)
                    (self.path / name).rename(self.checkpoints / name)

    def bring_back(self, *names: str) -> None:
        """Undoes `set_aside`."""
        with writing(self.path):
            for name in names:
                if (self.checkpoints / name).exists():
                    remove(self.path / name)
                    (self.checkpoints / name).rename(self.path / name)


class MetricsLog:
    """metrics.jsonl: one object a line, steps ascending, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.follow: Callable[[Mapping[str, Any]], None] | None = None  # is shown every record as well
        self._file: Any = None
        self._last_step: int | None = None
        self._last_offset = 0

    def open(self, before_step: int | None = None) -> None:
        """Opens for appending, with the records of steps below `before_step` (None: no records) kept.

        Lines that a crash cut short are dropped.
        """
        kept = b""
        if before_step is not None and self.path.exists():
            with writing(self.path):
                lines = self.path.read_bytes().splitlines(keepends=True)
            kept = b"".join(line for line in lines if _step_of(line) < before_step)
        with writing(self.path):
            write_bytes(self.path, kept)
            self._file = self.path.open("ab")

    @property
    def has_records(self) -> bool:
        """Whether there is anything in the file."""
        return self.path.exists() and self.path.stat().st_size > 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; one of the same step as the last replaces it. Values that are not finite become null."""
        record = finite(record)
        line = json.dumps(record, allow_nan=False) + "\n"
        with writing(self.path):
            if record["step"] == self._last_step:
                self._file.truncate(self._last_offset)
            self._last_offset = self._file.seek(0, os.SEEK_END)
            self._last_step = record["step"]
            self._file.write(line.encode())
            self._file.flush()
        if self.follow is not None:
            self.follow(record)

    def flush(self) -> None:
        """Returns once all records are on the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, if open."""
        if self._file is not None:
            with suppress(OSError):  # nothing is lost: every record was flushed, and a failure reported, when written
                self._file.close()
            self._file = None


def _step_of(line: bytes) -> float:
    """A record's step; infinity for what is no record."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
