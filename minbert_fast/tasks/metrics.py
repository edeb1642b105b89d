# SPDX-License-Identifier: Apache-2.0
"""Metrics in plain NumPy: accuracy, macro-F1, Pearson, Spearman, confusion matrices and the course's overall score.

Degenerate input has a defined value and gives no warning. Without examples a metric is 0; a correlation of fewer than two
examples or of a constant column is 0; the mean F1 ignores classes that neither occur nor are predicted. A value that is not
finite makes a correlation nan, so that a broken model does not look like an uncorrelated one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of predictions [n] that equal the labels [n]."""
    predictions, labels = _check_columns(predictions, labels)
    return float(np.mean(predictions == labels)) if len(labels) else 0.0


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes]: rows are labels, columns predictions. Raises ValueError for other values."""
    predictions, labels = _check_columns(predictions, labels)
    for values in (predictions, labels):
        if len(values) and not (np.isin(values, np.arange(classes))).all():
            raise ValueError(f"confusion matrix: expected whole numbers from 0 to {classes - 1}")
    flat = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def normalised_confusion(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its sum (the diagonal is the recall); a class without examples gives a row of zeros."""
    return np.asarray(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 = 2 TP / (2 TP + FP + FN) over the classes that occur or are predicted."""
    predictions, labels = _check_columns(predictions, labels)
    if not len(labels):
        return 0.0
    classes, codes = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    matrix = confusion_matrix(codes[: len(labels)], codes[len(labels) :], len(classes))
    hits = np.diag(matrix)
    return float(np.mean(2 * hits / (matrix.sum(axis=0) + matrix.sum(axis=1))))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of two columns [n]."""
    x, y = (values.astype(np.float64) for values in _check_columns(predictions, labels))
    if len(x) < 2:
        return 0.0
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # ptp is exact; the mean of equal values is rounded
        return 0.0
    x, y = ((values - values.mean()) / np.ptp(values) for values in (x, y))  # scaled, so that squares do not overflow
    return float(np.clip(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)), -1.0, 1.0))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation of two columns [n]."""
    x, y = _check_columns(predictions, labels)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    return pearson(ranks(x), ranks(y))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, [n] -> [n] fp64; equal values get the average of their ranks."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[codes])


def course_score(metrics: Mapping[str, float]) -> float | None:
    """(sentiment accuracy + paraphrase accuracy + (similarity Pearson + 1) / 2) / 3.

    The mean of those that exist if some are missing; None if all are.
    """
    parts = [metrics[name] for name in ("sentiment_accuracy", "paraphrase_accuracy") if name in metrics]
    if "similarity_pearson" in metrics:
        parts.append((metrics["similarity_pearson"] + 1) / 2)
    return sum(parts) / len(parts) if parts else None


def _check_columns(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(f"expected two columns of one length, got {predictions.shape} and {labels.shape}")
    return predictions, labels
