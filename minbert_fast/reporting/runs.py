# SPDX-License-Identifier: Apache-2.0
"""A training run (finished, stopped or running), read from the files under its `--output`.

Missing and damaged files become notices for the reader of the report; only a directory without any run is an error.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common.schema import ConfigError

#: Parts of a run's `timings` that are training. "steps" is time that the step does not attribute to a part (on a GPU: all).
TRAINING_PARTS = ("data", "forward", "backward", "exchange", "surgery", "clipping", "optimizer", "steps")

SPELLINGS = {  # of metrics; the longer pattern first
    "macro f1": "macro-F1", "micro f1": "micro-F1", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman",
    "matthews": "Matthews", "mae": "mean absolute error", "mrr": "MRR", r"ndcg at (\d+)": r"nDCG@\1",
    r"recall at (\d+)": r"recall@\1",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The files of a run."""

    directory: Path
    records: list[dict[str, Any]]  # metrics.jsonl, one per step, steps ascending
    summary: dict[str, Any]  # summary.json
    details: dict[str, Any]  # predictions/details.json: {"split", "tasks"}
    recipe: dict[str, Any]  # recipe.toml of the best or last model, else of the run
    notices: tuple[str, ...]  # one line per missing or damaged file

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return self.directory.resolve().name

    @property
    def dev(self) -> dict[str, float]:
        """Dev scores of the best model."""
        return numbers(self.summary.get("dev"))

    @property
    def untrained(self) -> dict[str, float]:
        """Dev scores before the first step."""
        return numbers(self.summary.get("untrained"))

    @property
    def train(self) -> dict[str, float]:
        """Scores of the best model on training rows; empty if the run did not measure them."""
        return numbers(self.summary.get("train"))

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Each task's entry in details.json, by name."""
        tasks = self.details.get("tasks")
        return {n: task for n, task in tasks.items() if isinstance(task, dict)} if isinstance(tasks, dict) else {}

    @property
    def published(self) -> dict[str, float]:
        """The dev scores that a report published for the run's recipe."""
        values = self.recipe.get("published")
        return numbers(values.get("dev", values)) if isinstance(values, Mapping) else {}

    @property
    def surgery(self) -> str:
        """The method of gradient surgery, or "none"."""
        return str((self.recipe.get("surgery") or {}).get("method", "none"))

    @property
    def training_seconds(self) -> float:
        """Seconds of all steps, without evaluations, checkpoints and loading."""
        timings = numbers(self.summary.get("timings"))
        return sum(timings.get(part, 0.0) for part in TRAINING_PARTS)

    @property
    def epoch_seconds(self) -> float:
        """`training_seconds` per epoch; nan for a run without whole records."""
        epochs = numbers(self.records[-1]).get("epoch", 0.0) if self.records else 0.0
        return self.training_seconds / epochs if epochs > 0 and self.training_seconds > 0 else np.nan

    def column(self, key: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """Steps (or epochs, `x`) [n] and values [n] of the records that have `key`; null becomes nan."""
        steps = [record.get(x, np.nan) for record in self.records if key in record]
        values = [numbers(record).get(key, np.nan) for record in self.records if key in record]
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    def finite(self, key: str) -> np.ndarray:
        """The finite values [n] of `key`, in order of their steps."""
        _, values = self.column(key)
        finite: np.ndarray = values[np.isfinite(values)]
        return finite

    def keys(self, prefix: str) -> list[str]:
        """Keys that start with `prefix` and have a value, in order of their first appearance."""
        return list({k: None for r in self.records for k, v in r.items() if k.startswith(prefix) and v is not None})

    def stage_steps(self) -> list[float]:
        """The last steps of all stages but the final one."""
        pairs = zip(self.records, self.records[1:], strict=False)
        return [float(a["step"]) for a, b in pairs if a.get("stage", 0) != b.get("stage", 0)]


def read_run(directory: Path) -> Run:
    """Reads a run's directory. Raises ConfigError if it has neither metrics.jsonl nor summary.json."""
    notices: list[str] = []
    if not (directory / "metrics.jsonl").is_file() and not (directory / "summary.json").is_file():
        problem = "holds neither metrics.jsonl nor summary.json" if directory.is_dir() else "no such directory"
        raise ConfigError(f"{directory}: {problem}; expected the --output directory of a training run")
    summary = read_json(directory / "summary.json", notices)
    records = _read_records(directory / "metrics.jsonl", notices)
    details = read_json(directory / "predictions" / "details.json", notices)
    recipe: dict[str, Any] = {}
    for name in ("best", "last", "checkpoints"):  # a run that was aborted, or gave its models away, has the third
        path = directory / name / "recipe.toml"
        if path.is_file() and not recipe:
            try:
                recipe = tomllib.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                notices.append(f"{name}/recipe.toml cannot be read: {error}")
    return Run(directory, records, summary, details, recipe, tuple(notices))


def display_name(name: str) -> str:
    """The name of a metric or task as a reader sees it."""
    words = name.replace("_", " ")
    for plain, written in SPELLINGS.items():
        words = re.sub(rf"\b{plain}\b", written, words)
    return words


def display_title(name: str) -> str:
    """`display_name` with a capital first letter."""
    words = display_name(name)
    return words[:1].upper() + words[1:]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one mapping with keys `section.key`."""
    entries: dict[str, Any] = {}
    for key, value in values.items():
        entries |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return entries


def numbers(values: Any) -> dict[str, float]:
    """The numeric entries of a mapping; empty for any other value."""
    if not isinstance(values, Mapping):
        return {}
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def format_score(value: Any, digits: int = 4) -> str:
    """A score with `digits` decimals; "-" for a value that is not a number."""
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def read_json(path: Path, notices: list[str]) -> dict[str, Any]:
    """A JSON object from a file; empty, with a line added to `notices`, if the file is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notices.append(f"{path.name} is missing (a run writes it when it ends)")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notices.append(f"{path.name} cannot be read: {error}")
        return {}
    return values if isinstance(values, dict) else {}


def _read_records(path: Path, notices: list[str]) -> list[dict[str, Any]]:
    """The records of metrics.jsonl by step; several lines of one step are merged, later values win."""
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
            by_step[step] = by_step.get(step, {}) | record
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
    if damaged:
        notices.append(f"metrics.jsonl: {damaged} damaged lines were left out")
    return [by_step[step] for step in sorted(by_step)]
