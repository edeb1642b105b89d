# SPDX-License-Identifier: Apache-2.0
"""The files under `--output`: one run at a time, one record per step in metrics.jsonl, directories replaced whole."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from minbert_fast.common.errors import RunError, translate_write_errors
from minbert_fast.common.storage import finite, flush_directory, remove, sweep, write_bytes, write_directory, write_json
from minbert_fast.trainer import trackers

LOCK, METRICS, SUMMARY, CHECKPOINTS = ".lock", "metrics.jsonl", "summary.json", "checkpoints"
RESULTS = ("best", "last", "predictions", "plots", METRICS, SUMMARY, "report.html", CHECKPOINTS)
TRACKED = (trackers.CSV, trackers.TENSORBOARD, trackers.WANDB_ID)  # written by --report-to


def unused_directory(base: Path) -> Path:
    """`base`, or the first of base-2, base-3, ... that does not exist."""
    candidate, number = base, 2
    while candidate.exists():
        candidate, number = base.with_name(f"{base.name}-{number}"), number + 1
    return candidate


def saved_recipe_path(output: Path) -> Path:
    """The path of the recipe that a run under `output` saves for `--resume`."""
    return output / CHECKPOINTS / "recipe.toml"


def saved_options_path(output: Path) -> Path:
    """The path of the trackers and copies of predictions (JSON) that a run under `output` saves for `--resume`."""
    return output / CHECKPOINTS / "options.json"


def lock_directory(path: Path) -> BinaryIO:
    """Makes directory `path` and locks it until the returned file is closed.

    Raises RunError if `path` cannot be written, or if another process holds the lock.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: cannot be written (it is a file, expected a directory)")
    with translate_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a+b", buffering=0)  # closing it writes nothing more to a full disk
    try:
        # The kernel releases the lock when the process ends, even after SIGKILL.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with translate_write_errors(path):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().decode().strip()
        lock.close()
        raise RunError(f"{path}: another run is writing here ({holder}); choose another --output") from None
    except RunError:
        lock.close()
        raise
    return lock


class RunDirectory:
    """A run's output directory, locked inside the `with` block. Raises RunError if another process holds the lock.

    `shown` is the directory that messages name: rank 0's, where a rank has another `path` for its own files.
    """

    def __init__(self, path: Path, shown: Path | None = None) -> None:
        self.path = path
        self.shown = path if shown is None else shown
        self.checkpoints = path / CHECKPOINTS
        self.metrics = MetricsLog(path / METRICS)
        self._lock: BinaryIO | None = None
        self._new = False

    def __enter__(self) -> RunDirectory:
        self._new = not self.path.exists()
        self._lock = lock_directory(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        metrics = self.metrics.path
        if self._new and not self.holds_run and not (metrics.exists() and metrics.stat().st_size):
            remove(self.path)  # the run ended before it wrote a result
        if self._lock is not None:
            self._lock.close()

    @property
    def holds_run(self) -> bool:
        """Whether the directory holds results that only --resume or --overwrite may change."""
        kept = set(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else set()
        results = (self.path / name for name in (SUMMARY, "best", "last"))
        settings = {saved_recipe_path(self.path), saved_options_path(self.path)}
        return bool(kept - settings) or any(path.exists() for path in results)

    def clear(self) -> None:
        """Removes an earlier run's results and no other files."""
        with translate_write_errors(self.path):
            for name in (*RESULTS, *TRACKED, *(path.name for path in self.path.glob("best-*"))):
                remove(self.path / name)

    def prepare(self, recipe: str, options: Mapping[str, Any]) -> None:
        """Repairs what a crash left behind, makes the folders, and saves recipe (TOML) and options for `--resume`.

        Removes the summary of an earlier part of the run.
        """
        with translate_write_errors(self.path):
            self.checkpoints.mkdir(exist_ok=True)
            self.repair()
            remove(self.path / SUMMARY)
            flush_directory(self.path)
            if any(options.values()):
                write_json(saved_options_path(self.path), options)
            else:
                remove(saved_options_path(self.path))
            write_bytes(saved_recipe_path(self.path), recipe.encode("utf-8"))

    def repair(self) -> None:
        """Restores directories and removes incomplete files that a crash left behind."""
        for directory in (self.path, self.checkpoints, self.path / "plots"):
            sweep(directory)

    @property
    def report_is_current(self) -> bool:
        """Whether the report was written after the summary: a kill may come between the two."""
        summary, report = self.path / SUMMARY, self.path / "report.html"
        return report.exists() and report.stat().st_mtime_ns >= summary.stat().st_mtime_ns

    def write_directory(self, name: str, fill: Callable[[Path], None]) -> None:
        """Replaces directory `name` by what `fill` writes into the path it is given."""
        with translate_write_errors(self.path / name):
            write_directory(self.path / name, fill)

    def set_aside(self, *names: str) -> None:
        """Moves directories into checkpoints/ before a provisional result takes their place; see `bring_back`."""
        self._move(names, self.path, self.checkpoints)

    def bring_back(self, *names: str) -> None:
        """Moves directories back from checkpoints/: a resumed run must not see the provisional results."""
        self._move(names, self.checkpoints, self.path)

    def _move(self, names: tuple[str, ...], source: Path, target: Path) -> None:
        with translate_write_errors(target):
            for name in names:
                if (source / name).exists():
                    remove(target / name)
                    (source / name).rename(target / name)


class MetricsLog:
    """metrics.jsonl: one JSON object per line, steps ascending, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_record: Callable[[Mapping[str, Any]], None] | None = None  # called with every record
        self._file: BinaryIO | None = None
        self._last_step: int | None = None
        self._last_offset = 0

    def open(self, before_step: int | None = None) -> None:
        """Opens the file for appending. Keeps the complete records of steps below `before_step` (None: no records)."""
        kept = b""
        with translate_write_errors(self.path):
            if before_step is not None and self.path.exists():
                lines = self.path.read_bytes().splitlines(keepends=True)
                kept = b"".join(line for line in lines if _step_of(line) < before_step)
            write_bytes(self.path, kept)
            self._file = self.path.open("ab")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record, or replaces the last one of the same step. Numbers that are not finite become null."""
        assert self._file is not None
        record = finite(record)
        line = json.dumps(record, allow_nan=False) + "\n"
        with translate_write_errors(self.path):
            if record["step"] == self._last_step:
                self._file.truncate(self._last_offset)
            self._last_offset = self._file.seek(0, os.SEEK_END)
            self._last_step = record["step"]
            self._file.write(line.encode())
            self._file.flush()
        if self.on_record is not None:
            self.on_record(record)

    def flush(self) -> None:
        """Returns when all records are on the disk."""
        assert self._file is not None
        with translate_write_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # `write` flushed every record and reported any failure
                self._file.close()
            self._file = None


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinity for a damaged or incomplete line."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
