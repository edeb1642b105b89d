# SPDX-License-Identifier: Apache-2.0
"""One task's predictions with labels and metrics, and the same as details.json holds it (docs/report.md lists the keys).

Shapes: n examples, C classes. Labels and predictions are [n], or matrices [n, C] of 0 and 1 for several labels an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minbert_fast.tasks.base import Task
from minbert_fast.tasks.metrics import average_precision, calibration, confusion_matrix

MAX_ERRORS = 25  # errors listed per task
BINS = 10  # of a regression's labels


@dataclass(frozen=True)
class TaskResult:
    """One task's predictions [n] in the order of its file, with labels and metrics."""

    task: Task
    ids: Sequence[str]
    labels: np.ndarray | None  # [n]
    predictions: np.ndarray  # [n] on the labels' scale: integers for classes written as whole numbers, else fp32
    probabilities: np.ndarray | None  # [n, C]
    metrics: dict[str, float]  # those of the task and `<task>_loss`, its head's mean loss; empty for an unlabelled file


def task_details(
    result: TaskResult, texts: Sequence[Sequence[str]] | None, train_labels: np.ndarray | None = None
) -> dict[str, Any]:
    """A task's results as JSON values. `texts` are the sentences of its file: one list [n] per sentence of an example."""
    task, classes, labels = result.task, result.task.class_names, result.labels
    details: dict[str, Any] = {
        "kind": task.kind,
        "primary": task.primary,
        "classes": classes,
        "metrics": {key: _finite(value) for key, value in result.metrics.items()},
        "ids": list(result.ids),
        "labels": None if labels is None else _rounded(labels.tolist()),
        "predictions": _rounded(result.predictions.tolist()),
    }
    if labels is None or not len(labels):
        return details
    details["distribution"] = _distribution(labels, result.predictions, train_labels, len(classes or ()))
    if classes is not None:
        if labels.ndim == 1:
            details["confusion"] = confusion_matrix(result.predictions, labels, len(classes)).tolist()
        if result.probabilities is not None and np.isfinite(result.probabilities).all():
            details |= _probabilities(labels, result.predictions, result.probabilities)
    if texts is not None:
        details["worst"] = _worst_errors(result, labels, texts)
    return details


def _probabilities(labels: np.ndarray, predictions: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Calibration of the predicted classes (of every label, for several an example), and average precision by class."""
    if labels.ndim == 1:
        rows, error = calibration(_probability_of(predictions, probabilities), predictions == labels)
        truth = labels[:, None].astype(np.int64) == np.arange(probabilities.shape[1])
    else:
        rows, error = calibration(probabilities.ravel(), labels.ravel())
        truth = labels != 0
    precisions = [average_precision(probabilities[:, c], truth[:, c]) for c in range(truth.shape[1])]
    return {
        "calibration": {"bins": _rounded(rows.tolist()), "error": _finite(error)},
        "average_precision": _rounded(precisions),
    }


def _probability_of(classes: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The probability [n] of each row's class in `classes` [n]."""
    return np.asarray(probabilities[np.arange(len(classes)), classes.astype(np.int64)])


def _distribution(
    labels: np.ndarray, predictions: np.ndarray, train_labels: np.ndarray | None, classes: int
) -> dict[str, Any]:
    """How many rows have each class, or a number in each of BINS ranges: of the training labels, labels and predictions."""
    known = [labels] if train_labels is None else [labels, train_labels]
    edges = None if classes else np.histogram_bin_edges(np.concatenate(known), BINS)

    def count(values: np.ndarray) -> Any:
        if values.ndim == 2:
            return (values != 0).sum(axis=0).tolist()
        if edges is None:
            return np.bincount(values.astype(np.int64), minlength=classes).tolist()
        inside = np.clip(values[np.isfinite(values)], edges[0], edges[-1])
        return np.histogram(inside, edges)[0].tolist()

    return {
        "edges": None if edges is None else _rounded(edges.tolist()),
        "train": None if train_labels is None else count(train_labels),
        "train_rows": None if train_labels is None else len(train_labels),
        "labels": count(labels),
        "predictions": count(predictions),
    }


def _worst_errors(result: TaskResult, labels: np.ndarray, texts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The mistakes in which the model was most sure; for a regression, those of the largest |prediction - label|.

    With several labels an example, the order is that of the wrong label with the largest |probability - label|.
    """
    predictions, probabilities = result.predictions, result.probabilities
    if probabilities is not None and labels.ndim == 2:
        error = sure = np.where(predictions != labels, np.abs(probabilities - labels), 0.0).max(axis=1)
        wrong = (predictions != labels).any(axis=1)
    elif probabilities is not None:
        sure = _probability_of(predictions, probabilities)
        error = 1 - _probability_of(labels, probabilities)
        wrong = predictions != labels
    else:
        error = sure = np.abs(predictions - labels).reshape(len(labels), -1).max(axis=1)
        wrong = sure > 0
    rows = np.flatnonzero(wrong)
    rows = rows[np.argsort(-sure[rows], kind="stable")][:MAX_ERRORS]
    return [
        {
            "id": result.ids[row],
            "sentences": [column[row] for column in texts],
            "label": _rounded(labels[row].tolist()),
            "prediction": _rounded(predictions[row].tolist()),
            "probability": None if probabilities is None else _finite(float(sure[row])),
            "error": _finite(float(error[row])),
        }
        for row in rows.tolist()
    ]


def _rounded(values: Any) -> Any:
    """Numbers, in lists of any depth, with at most six decimals; values that are not finite become None."""
    return [_rounded(value) for value in values] if isinstance(values, list) else _finite(values)


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
