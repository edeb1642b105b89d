# SPDX-License-Identifier: Apache-2.0
"""Did training go well? One verdict per task: its score against the model before training and against a constant answer."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minbert_fast.reporting.runs import Run, display_name, numbers, read_run
from minbert_fast.tasks.metrics import OF_PREDICTIONS, lower_is_better, standard_error

Level = Literal["worse", "unclear", "better"]
ORDER: tuple[Level, ...] = ("worse", "unclear", "better")
MARGIN = 2  # standard errors by which a score must differ to be better or worse
COLOURS: Mapping[Level, str] = {"worse": "31", "unclear": "33", "better": "32"}  # of a terminal


@dataclass(frozen=True)
class Verdict:
    """How one task went, by the metric that judges it."""

    task: str
    level: Level
    metric: str  # `accuracy`, `macro_f1`, ...
    value: float  # nan: not a number
    error: float  # standard error of the value over the rows
    before: float | None  # the value before training; None: unknown
    constant: float | None  # the value of a constant answer; None: the task has none
    constant_name: str  # of that answer
    text: str  # the verdict in words, without the numbers

    @property
    def line(self) -> str:
        """The verdict with its numbers, for the terminal."""
        known = [("before training", self.before), (self.constant_name, self.constant)]
        others = ", ".join(f"{value:.3f} {name}" for name, value in known if value is not None)
        value = "not a number" if math.isnan(self.value) else f"{self.value:.3f}"
        if math.isfinite(self.value) and math.isfinite(self.error):
            value += f" ± {self.error:.3f}"
        return f"{self.task}: {self.text}: {display_name(self.metric)} {value}{f' ({others})' if others else ''}"


def verdicts(run: Run) -> list[Verdict]:
    """A verdict on each task of details.json that has a score, the bad ones first."""
    found = [_judge(name, task, run.untrained) for name, task in run.tasks.items() if primary_metric(task)]
    return sorted(found, key=lambda verdict: ORDER.index(verdict.level))


def announce(directory: Path) -> str:
    """The verdicts on the run in `directory` as lines for the terminal, in colours if it shows them."""
    run = read_run(directory)
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    found = [(verdict.level, verdict.line) for verdict in verdicts(run)]
    if text := fallen_score(run):
        found.insert(0, ("worse", text))
    return "\n".join(text if plain else f"\x1b[{COLOURS[level]}m{text}\x1b[0m" for level, text in found)


def fallen_score(run: Run) -> str:
    """A sentence if the overall score is below that of the model before training, or not a number; else empty."""
    before = run.untrained.get("score")
    known = run.summary.get("dev")
    if before is None or not isinstance(known, Mapping) or "score" not in known:
        return ""
    now = run.dev.get("score", math.nan)
    if round(now, 3) >= round(before, 3):  # as they are printed
        return ""
    value = "not a number" if math.isnan(now) else f"{now:.3f}"
    return f"Overall score: worse than before training: {value} ({before:.3f} before training)"


def primary_metric(task: Mapping[str, Any]) -> str:
    """The full name of the metric that judges a task of details.json; empty for a task without metrics."""
    key = str(task.get("primary") or "")
    return key if key in (task.get("metrics") or {}) and "predictions" in task else ""


def column(values: Any) -> np.ndarray:
    """Labels or predictions of details.json as numbers [n] or [n, C]; None becomes nan."""
    return np.array(values, dtype=np.float64)


def _judge(name: str, task: Mapping[str, Any], untrained: Mapping[str, float]) -> Verdict:
    key = primary_metric(task)
    metric = key.removeprefix(f"{name}_")
    scores, loss, f1 = numbers(task["metrics"]), f"{name}_loss", f"{name}_macro_f1"
    value = scores.get(key, math.nan)
    before = untrained.get(key)
    predictions = column(task["predictions"])
    labels = None if task.get("labels") is None else column(task["labels"])
    function = OF_PREDICTIONS.get(metric)
    constant, constant_name = None, ""
    # The largest error of a mean of n values in [0, 1], for metrics that need more than predictions and labels.
    error = math.sqrt(value * (1 - value) / max(len(predictions), 1)) if 0 <= value <= 1 else math.nan
    if function is not None and labels is not None and np.isfinite(predictions).all():
        error = standard_error(function, predictions, labels)
        answer, constant_name = _constant_answer(task, labels)
        constant = function(np.broadcast_to(answer, labels.shape), labels)
    sign = -1 if lower_is_better(metric) else 1

    def compare(other: float) -> Level:
        gain = sign * (value - other)
        return "better" if gain > MARGIN * error else "worse" if gain < -MARGIN * error else "unclear"

    others = [("before training", before), (constant_name, constant)]
    levels = {words: compare(other) for words, other in others if other is not None}
    level: Level = "better" if levels and set(levels.values()) == {"better"} else "unclear"
    text = _in_words(levels)
    if collapse := collapsed_class(task) or _too_many_labels(task):
        text += f", {'but' if level == 'better' else 'and'} {collapse}"
        level = "unclear"
        if f1 in untrained and round(scores.get(f1, math.inf), 3) < round(untrained[f1], 3):  # as they are printed
            text += f", and macro-F1 fell from {untrained[f1]:.3f} to {scores[f1]:.3f}"
    if levels.get("before training") == "worse":
        level = "worse"
    # A head answers a class even if its scores are not numbers, so its metrics alone do not show that it broke.
    if math.isnan(value) or (loss in task["metrics"] and math.isnan(scores.get(loss, math.nan))):
        level, text = "worse", "diverged: not a number"
    return Verdict(name, level, metric, value, error, before, constant, constant_name, text)


def _in_words(levels: Mapping[str, Level]) -> str:
    """The comparisons as text: better than before training and always “neutral”."""
    parts = []
    for level, words in (("worse", "worse than"), ("better", "better than"), ("unclear", "not clearly better than")):
        names = [name for name, found in levels.items() if found == level]
        if names:
            parts.append(f"{words} {(' or ' if level == 'unclear' else ' and ').join(names)}")
    return ", ".join(parts) or "nothing to compare it with"


def _constant_answer(task: Mapping[str, Any], labels: np.ndarray) -> tuple[np.ndarray, str]:
    """The best constant answer, and its name: the most frequent class, each label's more frequent value, or the mean.

    Taken from the training labels if details.json has their distribution, as an answer may not know the dev labels; the
    mean is that of the dev labels.
    """
    classes = task.get("classes")
    if not classes:
        return labels.mean(axis=0), "the mean of the labels"
    if labels.ndim == 2:
        return (labels.mean(axis=0) > 0.5).astype(np.float64), "the most frequent labels"
    counts = (task.get("distribution") or {}).get("train")
    most = int(np.argmax(counts if counts and sum(counts) else np.bincount(labels.astype(int))))
    return np.array(float(most)), f"always answering “{classes[most]}”"


def collapsed_class(task: Mapping[str, Any]) -> str:
    """A sentence about a class that is answered far too often; empty if there is no such class.

    A class is answered far too often if it takes more than half of the rows that belong to the others. With several
    labels an example, a sentence if fewer than half as many labels are given as there are.
    """
    labels, classes = column(task.get("labels") or []), task.get("classes")
    if labels.ndim == 2:
        given, there = column(task["predictions"]).sum(), labels.sum()
        return f"it gives {given:,.0f} labels where there are {there:,.0f}" if given < there / 2 else ""
    matrix = np.array(task.get("confusion") or [])
    if not classes or len(classes) < 2 or matrix.ndim != 2 or not matrix.sum():
        return ""
    predicted, true = matrix.sum(axis=0) / matrix.sum(), matrix.sum(axis=1) / matrix.sum()
    most = int(predicted.argmax())
    if predicted[most] <= true[most] + (1 - true[most]) / 2:
        return ""
    return f"it answers “{classes[most]}” for {predicted[most]:.0%} of the rows ({true[most]:.0%} have that label)"


def _too_many_labels(task: Mapping[str, Any]) -> str:
    """A sentence if a task of several labels an example gives more than twice as many labels as there are."""
    labels = column(task.get("labels") or [])
    given, there = column(task["predictions"]).sum(), labels.sum()
    return (
        f"it gives {given:,.0f} labels where there are {there:,.0f}" if labels.ndim == 2 and given > 2 * there else ""
    )
