# SPDX-License-Identifier: Apache-2.0
"""Metrics in plain NumPy, of classes, several labels, numbers and rankings, and the course's overall score.

Degenerate input has a defined value and gives no warning. Without examples a metric is 0; a correlation of fewer than two
examples or of a constant column is 0; means over classes ignore those that neither occur nor are predicted. A value that is
not finite makes a correlation or an error nan, so that a broken model does not look like an uncorrelated one.

Shapes: n examples, C classes. Several labels an example are a matrix [n, C] of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

#: The last words of the names of metrics whose lowest value is the best one. A kind of your own may add its own.
LOWER_IS_BETTER = {"loss", "mae", "mse", "rmse", "mape", "error", "perplexity", "brier"}

#: The metrics in the course's score, by task.
COURSE_METRICS = {
    "sentiment": "sentiment_accuracy",
    "paraphrase": "paraphrase_accuracy",
    "similarity": "similarity_pearson",
}


def lower_is_better(metric: str) -> bool:
    """Whether the lowest value of `metric` (`mae`, `topic_loss`) is the best one."""
    return metric.rpartition("_")[2] in LOWER_IS_BETTER


# ---- Classes ---------------------------------------------------------------------------------------------------------


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of predictions that equal the labels, both [n]; for [n, C], of the rows that equal them in every label."""
    predictions, labels = _check(predictions, labels, matrices=True)
    equal = predictions == labels
    return float(np.mean(equal if equal.ndim == 1 else equal.all(axis=1))) if len(labels) else 0.0


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts [classes, classes]: rows are labels, columns predictions. Raises ValueError for other values."""
    predictions, labels = _check(predictions, labels)
    for values in (predictions, labels):
        if len(values) and not (np.isin(values, np.arange(classes))).all():
            raise ValueError(f"confusion matrix: expected whole numbers from 0 to {classes - 1}")
    flat = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def normalised_confusion(matrix: np.ndarray) -> np.ndarray:
    """Each row divided by its sum (the diagonal is the recall); a class without examples gives a row of zeros."""
    return np.asarray(matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))


def precision_recall_f1(predictions: np.ndarray, labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Precision, recall and F1 of each class, [C, 3].

    Predictions and labels are classes [n], 0 to `classes` - 1, or matrices [n, C]. F1 = 2 TP / (2 TP + FP + FN). A class
    that is never predicted has precision 0, one that does not occur recall 0. Raises ValueError for other values.
    """
    predictions, labels = _check(predictions, labels, matrices=True)
    if labels.ndim == 2:
        hits, predicted, true = (np.sum(m != 0, axis=0) for m in (predictions * labels, predictions, labels))
    else:
        assert classes is not None
        matrix = confusion_matrix(predictions, labels, classes)
        hits, predicted, true = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    return np.stack([_share(hits, predicted), _share(hits, true), _share(2 * hits, predicted + true)], axis=1)


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 over the classes that occur or are predicted; predictions and labels are both [n] or both [n, C]."""
    return _macro(predictions, labels, 2)


def macro_precision(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean precision over the classes that occur or are predicted, as `macro_f1`."""
    return _macro(predictions, labels, 0)


def macro_recall(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean recall over the classes that occur or are predicted, as `macro_f1`."""
    return _macro(predictions, labels, 1)


def micro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of all labels of all rows together, for matrices [n, C]: 2 TP / (2 TP + FP + FN); 0 if there are no labels."""
    predictions, labels = np.asarray(predictions) != 0, np.asarray(labels) != 0
    total = predictions.sum() + labels.sum()
    return float(2 * (predictions & labels).sum() / total) if total else 0.0


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The Matthews correlation of classes [n], -1 to 1; for more than two classes Gorodkin's R_K.

    0 if all predictions or all labels are of one class. Gorodkin 2004, "Comparing two K-category assignments by a
    K-category correlation coefficient", equation 8.
    """
    codes, count = _codes(predictions, labels)
    matrix = confusion_matrix(*codes, count).astype(np.float64)
    predicted, true, n = matrix.sum(axis=0), matrix.sum(axis=1), matrix.sum()
    spread = (n * n - predicted @ predicted) * (n * n - true @ true)
    return float((n * np.trace(matrix) - predicted @ true) / np.sqrt(spread)) if spread > 0 else 0.0


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under the precision-recall curve as a sum of steps: the mean over thresholds of (R_k - R_{k-1}) P_k.

    Scores [n] against labels [n] of 0 and 1; for matrices [n, C], the mean over the classes that occur. Equal scores
    share one threshold. 0 if no class occurs, nan if a score is not finite.
    """
    scores, labels = _check(scores, labels, matrices=True)
    if labels.ndim == 2:
        parts = [average_precision(scores[:, c], labels[:, c]) for c in range(labels.shape[1]) if labels[:, c].any()]
        return float(np.mean(parts)) if parts else 0.0
    if not np.isfinite(scores).all():
        return float("nan")
    if not labels.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(labels[order] != 0)
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float(np.diff(recall, prepend=0.0) @ precision)


def calibration(confidences: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, float]:
    """How often predictions of a given confidence are right: one row per filled bin, and the expected calibration error.

    `confidences` [n] from 0 to 1, `right` [n] of 0 and 1. The ten bins have equal width. A row is (mean confidence, share
    that is right, examples), [filled bins, 3]; the error is the mean of |confidence - share|, weighted by examples.
    Guo et al. 2017, "On Calibration of Modern Neural Networks", equations 1 to 3.
    """
    confidences, right = _check(confidences, right)
    bins = 10
    place = np.clip(np.ceil(confidences * bins).astype(np.int64) - 1, 0, bins - 1)  # bins are (low, high]
    counts = np.bincount(place, minlength=bins)
    filled = counts > 0
    sums = (np.bincount(place, weights=values, minlength=bins)[filled] for values in (confidences, right))
    mean, share = (total / counts[filled] for total in sums)
    error = float(counts[filled] @ np.abs(mean - share) / len(right)) if len(right) else 0.0
    return np.stack([mean, share, counts[filled]], axis=1), error


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation of two columns [n]."""
    x, y = (values.astype(np.float64) for values in _check(predictions, labels))
    if len(x) < 2:
        return 0.0
    if not _finite(x, y):
        return float("nan")
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # ptp is exact; the mean of equal values is rounded
        return 0.0
    x, y = ((values - values.mean()) / np.ptp(values) for values in (x, y))  # scaled, so that squares do not overflow
    return float(np.clip(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)), -1.0, 1.0))


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation of two columns [n]."""
    x, y = _check(predictions, labels)
    return pearson(ranks(x), ranks(y)) if _finite(x, y) else float("nan")


def mae(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean absolute error of a column [n]; nan if a value is not finite."""
    x, y = (values.astype(np.float64) for values in _check(predictions, labels))
    if not _finite(x, y):
        return float("nan")
    return float(np.abs(x - y).mean()) if len(x) else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, [n] -> [n] fp64; equal values get the average of their ranks."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[codes])


# ---- Rankings --------------------------------------------------------------------------------------------------------


def ranks_of(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The rank, from 1, of the right candidate of each query: scores [n, candidates], columns `right` [n] -> [n].

    Candidates with an equal score count as better, so a model that scores all of them alike ranks last, not first. A score
    that is not finite ranks last too.
    """
    of_right = np.take_along_axis(scores, np.asarray(right)[:, None], axis=1)
    return np.asarray(np.sum(~(scores < of_right), axis=1))


def recall_at(ranks: np.ndarray, k: int) -> float:
    """The share of queries whose right candidate is among the first k; ranks [n] from 1."""
    return float(np.mean(np.asarray(ranks) <= k)) if len(ranks) else 0.0


def mrr(ranks: np.ndarray) -> float:
    """The mean reciprocal rank of the right candidates; ranks [n] from 1."""
    return float(np.mean(1 / np.asarray(ranks))) if len(ranks) else 0.0


def ndcg_at(ranks: np.ndarray, k: int = 10) -> float:
    """The normalised discounted cumulative gain of the first k candidates, one of which is right; ranks [n] from 1.

    1 / log2(1 + rank) within the first k, else 0. Järvelin and Kekäläinen 2002, with one relevant candidate a query.
    """
    ranks = np.asarray(ranks)
    return float(np.mean(np.where(ranks <= k, 1 / np.log2(1 + ranks), 0.0))) if len(ranks) else 0.0


# ---- Overall ---------------------------------------------------------------------------------------------------------

#: Metrics of predictions and labels alone, by the end of their full name (`topic_macro_f1`).
OF_PREDICTIONS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "macro_precision": macro_precision,
    "macro_recall": macro_recall,
    "micro_f1": micro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "mae": mae,
}


def standard_error(
    metric: Callable[[np.ndarray, np.ndarray], float], predictions: np.ndarray, labels: np.ndarray
) -> float:
    """The standard error of `metric` over the n rows, by the delete-a-group jackknife; nan for fewer than two rows.

    Computes the metric g = 50 times, each time without every g-th row: sqrt((g - 1) / g * sum((m_i - mean)^2)).
    Shao and Tu 1995, "The Jackknife and Bootstrap", section 2.3.
    """
    n = len(labels)
    groups = min(50, n)
    if groups < 2:
        return float("nan")
    group = np.random.default_rng(0).permutation(n) % groups  # files may be sorted by label
    values = np.array([metric(predictions[group != g], labels[group != g]) for g in range(groups)])
    return float(np.sqrt((groups - 1) * values.var()))


def course_score(metrics: Mapping[str, float]) -> float | None:
    """(sentiment accuracy + paraphrase accuracy + (similarity Pearson + 1) / 2) / 3.

    The mean of those that exist if some are missing; None if all are.
    """
    found = {task: metrics[metric] for task, metric in COURSE_METRICS.items() if metric in metrics}
    parts = [(value + 1) / 2 if task == "similarity" else value for task, value in found.items()]
    return sum(parts) / len(parts) if parts else None


def _macro(predictions: np.ndarray, labels: np.ndarray, column: int) -> float:
    """The mean of a column of `precision_recall_f1` over the classes that occur or are predicted."""
    predictions, labels = _check(predictions, labels, matrices=True)
    if labels.ndim == 2:
        present = (predictions != 0).any(axis=0) | (labels != 0).any(axis=0)
        table = precision_recall_f1(predictions[:, present], labels[:, present])
    else:
        codes, count = _codes(predictions, labels)
        table = precision_recall_f1(*codes, count)
    return float(table[:, column].mean()) if len(table) else 0.0


def _codes(predictions: np.ndarray, labels: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Predictions and labels [n] as numbers of the values that occur in either, and how many values there are."""
    predictions, labels = _check(predictions, labels)
    values, codes = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    return (codes[: len(labels)], codes[len(labels) :]), len(values)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where `whole` is 0."""
    return np.asarray(part / np.maximum(whole, 1))


def _finite(*columns: np.ndarray) -> bool:
    return all(np.isfinite(values).all() for values in columns)


def _check(predictions: np.ndarray, labels: np.ndarray, matrices: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The arguments as arrays. Raises ValueError unless both are [n], or with `matrices` both are [n, C]."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim not in ((1, 2) if matrices else (1,)):
        raise ValueError(f"expected two columns of one length, got {predictions.shape} and {labels.shape}")
    return predictions, labels
