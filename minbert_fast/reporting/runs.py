# SPDX-License-Identifier: Apache-2.0
"""A finished (or stopped, or running) training run, read back from the files under its `--output`.

Nothing here fails for a missing or damaged file except where there is no run at all: what cannot be read becomes a
notice for the reader of the report.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common.schema import ConfigError

#: Timings of a run that are training; "steps" is what a step does not tell apart (on a GPU: everything).
TRAINING = ("data", "forward", "backward", "exchange", "surgery", "clipping", "optimizer", "steps")


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    directory: Path
    records: list[dict[str, Any]]  # metrics.jsonl, one a step, steps ascending
    summary: dict[str, Any]  # summary.json
    details: dict[str, Any]  # predictions/details.json: {"split", "tasks"}
    recipe: dict[str, Any]  # recipe.toml of the best or last model
    notices: tuple[str, ...]  # what is missing or damaged

    @property
    def name(self) -> str:
        """What to call the run: its directory's name."""
        return self.directory.resolve().name

    @property
    def dev(self) -> dict[str, float]:
        """Dev scores of the best model."""
        return _numbers(self.summary.get("dev"))

    def column(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and values [n] of the records that have `key`; null becomes nan."""
        pairs = [(r["step"], r[key]) for r in self.records if key in r]
        values = [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else np.nan for _, v in pairs]
        return np.array([step for step, _ in pairs], dtype=np.float64), np.array(values, dtype=np.float64)

    def keys(self, prefix: str) -> list[str]:
        """Keys that start with `prefix` and hold a number somewhere, in the order of their first appearance."""
        found = {k: None for r in self.records for k, v in r.items() if k.startswith(prefix) and v is not None}
        return list(found)

    def stage_steps(self) -> list[float]:
        """Steps after which another stage began."""
        marks = []
        for before, after in zip(self.records, self.records[1:], strict=False):
            if before.get("stage", 0) != after.get("stage", 0):
                marks.append(float(before["step"]))
        return marks


def read_run(directory: Path) -> Run:
    """Reads a run's directory. Raises ConfigError where it holds neither metrics.jsonl nor summary.json."""
    notices: list[str] = []
    if not (directory / "metrics.jsonl").is_file() and not (directory / "summary.json").is_file():
        problem = "holds neither metrics.jsonl nor summary.json" if directory.is_dir() else "no such directory"
        raise ConfigError(f"{directory}: {problem}; expected the --output directory of a training run")
    summary = _json(directory / "summary.json", notices)
    records = _records(directory / "metrics.jsonl", notices)
    details = _json(directory / "predictions" / "details.json", notices)
    recipe: dict[str, Any] = {}
    for name in ("best", "last"):
        path = directory / name / "recipe.toml"
        if path.is_file() and not recipe:
            try:
                recipe = tomllib.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                notices.append(f"{name}/recipe.toml cannot be read: {error}")
    return Run(directory, records, summary, details, recipe, tuple(notices))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as `section.key` entries."""
    entries: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            entries |= flat(value, f"{prefix}{key}.")
        else:
            entries[f"{prefix}{key}"] = value
    return entries


def _json(path: Path, notices: list[str]) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notices.append(f"{path.name} is not there (a run writes it when it ends)")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notices.append(f"{path.name} cannot be read: {error}")
        return {}
    return values if isinstance(values, dict) else {}


def _records(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl by step; of one step's lines the later add to or replace the earlier."""
    by_step: dict[float, dict[str, Any]] = {}
    damaged = 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        notices.append(f"metrics.jsonl cannot be read: {error.strerror}")
        return []
    for line in lines:
        try:
            record = json.loads(line)
            step = float(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
            continue
        by_step[step] = by_step.get(step, {}) | record
    if damaged:
        notices.append(f"metrics.jsonl: {damaged} damaged lines were left out")
    return [by_step[step] for step in sorted(by_step)]


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
