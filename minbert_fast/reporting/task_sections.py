# SPDX-License-Identifier: Apache-2.0
"""The report's section on one task: its predictions against the labels, by class or by number, and its worst errors.

Reads only the task's entry in details.json (`minbert_fast/tasks/inference/details.py`), so a task of any kind has a section.
Shapes: n examples, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from minbert_fast.reporting import charts
from minbert_fast.reporting.page import Plots, collapsible, figure, figure_grid, paragraph, scrollable, table
from minbert_fast.reporting.runs import display_name, numbers
from minbert_fast.reporting.verdicts import column
from minbert_fast.tasks.metrics import normalised_confusion, precision_recall_f1

SHOWN_ERRORS = 6  # per task; a click shows the others
SHOWN_CLASSES = 12  # in matrices and tables; of more classes, the most frequent mistakes are listed


def task_section(name: str, task: Mapping[str, Any], plots: Plots) -> str:
    """The section of task `name`; empty without labels to compare with. Adds its charts to `plots`."""
    classes, labels = task.get("classes"), task.get("labels")
    if not labels or not task.get("predictions"):
        return ""
    figures: list[str] = []
    if classes:
        if task.get("confusion"):
            figures += _confusion(name, np.array(task["confusion"]), classes, plots)
        figures.append(figure("By class", _by_class(name, task, classes)))
    else:
        figures += _scatter(name, column(labels), column(task["predictions"]), plots)
    figures += _distribution(name, task, classes, plots) + _calibration(name, task, plots)
    return figure_grid(figures) + _errors(task, classes)


# ---- Classes ---------------------------------------------------------------------------------------------------------


def _confusion(name: str, counts: np.ndarray, classes: list[str], plots: Plots) -> list[str]:
    """The confusion matrix as counts and as shares of each true class; of many classes, the most frequent mistakes."""
    shares = normalised_confusion(counts)
    if len(classes) > SHOWN_CLASSES:
        mistakes = counts - np.diag(np.diag(counts))
        order = np.argsort(-mistakes, axis=None, kind="stable")[:SHOWN_CLASSES]
        cells = zip(*np.unravel_index(order, counts.shape), strict=True)
        rows = [
            [classes[i], classes[j], f"{counts[i, j]:,}", f"{shares[i, j]:.1%}"] for i, j in cells if mistakes[i, j]
        ]
        listed = table(f"{name}: mistakes", ["truth", "predicted", "rows", "of the truth"], rows, text_columns=2)
        return [figure("Most frequent mistakes", listed)] if rows else []
    label = f"Confusion matrix of {display_name(name)}"
    forms = ("counts", counts, "{:,.0f}", ""), ("shares of the truth", shares, "{:.2f}", "-normalised")
    for words, values, form, suffix in forms:
        svg = charts.matrix_chart(f"{label}, {words}", values, classes, form.format)
        plots[f"confusion-{name}{suffix}"] = svg
    text = paragraph("Rows are the truth, columns the prediction.", "muted")
    return [
        figure("Confusion matrix: rows", text + _matrix(f"{name}: counts", counts, shares, classes, "{:,.0f}")),
        figure("Confusion matrix: shares of the truth", _matrix(f"{name}: shares", shares, shares, classes, "{:.2f}")),
    ]


def _matrix(label: str, values: np.ndarray, shares: np.ndarray, classes: Sequence[str], form: str) -> str:
    numbered = len(classes) > 2
    head = "".join(f'<th scope="col">{i if numbered else escape(c)}</th>' for i, c in enumerate(classes))
    rows = []
    for i, name in enumerate(classes):
        cells = "".join(
            f'<td style="--share: {0.6 * share:.3f}">{form.format(value)}</td>'
            for value, share in zip(values[i], shares[i], strict=True)
        )
        rows.append(f'<tr><th scope="row">{f"{i} " if numbered else ""}{escape(name)}</th>{cells}</tr>')
    body = f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return scrollable(label, f'<table class="matrix">{body}</table>')


def _by_class(name: str, task: Mapping[str, Any], classes: list[str]) -> str:
    """Precision, recall, F1 and average precision of each class, the worst first if there are many."""
    labels, predictions = column(task["labels"]), column(task["predictions"])
    scores = precision_recall_f1(predictions, labels, len(classes))
    counts = labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels.astype(int), minlength=len(classes))
    heads = ["class", "rows", "precision", "recall", "F1"]
    if precisions := task.get("average_precision"):
        heads.append("AP")
        scores = np.concatenate([scores, column(precisions)[:, None]], axis=1)
    order = np.argsort(scores[:, 2], kind="stable") if len(classes) > SHOWN_CLASSES else np.arange(len(classes))
    names = [f"{i} {words}" for i, words in enumerate(classes)] if 2 < len(classes) <= SHOWN_CLASSES else classes
    rows = [[names[c], f"{counts[c]:,.0f}", *(f"{score:.2f}" for score in scores[c])] for c in order]
    text = f"Recall is the accuracy within a class{'; AP: average precision' if precisions else ''}."
    shown = table(f"{name} by class", heads, rows[:SHOWN_CLASSES])
    more = rows[SHOWN_CLASSES:]
    rest = collapsible(f"{len(more)} more", table(f"{name} by class, more", heads, more)) if more else ""
    return paragraph(text, "muted") + shown + rest


def _calibration(name: str, task: Mapping[str, Any], plots: Plots) -> list[str]:
    found = task.get("calibration") or {}
    if not found.get("bins"):
        return []
    confidence, share, _ = column(found["bins"]).T
    lines = [
        charts.Series("measured", confidence, share, marked=True),
        charts.Series("perfect", np.array([0.0, 1.0]), np.array([0.0, 1.0])),
    ]
    title = f"Calibration of {display_name(name)}: how often the model is right against how sure it is"
    plots[f"calibration-{name}"] = charts.line_chart(title, lines, "probability that the model gives", (0.0, 1.0))
    caption = f"Calibration: share that is right (expected error {found['error']:.3f})"
    return [figure(caption, plots[f"calibration-{name}"])]


def _distribution(name: str, task: Mapping[str, Any], classes: list[str] | None, plots: Plots) -> list[str]:
    """How the training labels, the dev labels and the predictions are distributed, as bars and in numbers."""
    found = task.get("distribution") or {}
    sets = [("train", "train"), ("labels", "dev"), ("predictions", "predicted")]
    series = [(words, column(found[key])) for key, words in sets if found.get(key)]
    if not series:
        return []
    edges = found.get("edges") or []
    names = classes or [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    rows = len(task["labels"])
    shares = [(words, counts / ((found["train_rows"] if words == "train" else rows) or 1)) for words, counts in series]
    title = f"Labels and predictions of {display_name(name)}"
    many = len(names) > SHOWN_CLASSES
    order = np.argsort(-shares[0][1], kind="stable")[:SHOWN_CLASSES] if many else np.arange(len(names))
    shown = [f"{i} {names[i]}" if classes and not many else names[i] for i in order]
    cells = [[words, *(f"{values[i]:.1%}" for _, values in shares)] for words, i in zip(shown, order, strict=True)]
    heads = ["class" if classes else "label", *(words for words, _ in shares)]
    body = table(f"{title} in numbers", heads, cells)
    if not many:
        ticks = [str(i) for i in range(len(names))] if classes else [f"{low:.3g}" for low in edges[:-1]]
        room = (charts.WIDTH - charts.LEFT - charts.RIGHT) / len(names)  # of a group of bars
        if classes and charts.CHARACTER * max(map(len, names)) < room:
            ticks = classes
        chart = charts.bar_chart(title, shares, ticks, "class" if classes else "from")
        plots[f"distribution-{name}"] = chart
        body = chart + collapsible("In numbers", body)
    return [figure("Labels and predictions: shares", body)]


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def _scatter(name: str, truth: np.ndarray, predicted: np.ndarray, plots: Plots) -> list[str]:
    """Predictions against labels as points with their mean in bins of the label, and the bins in numbers."""
    known = np.concatenate([truth, predicted[np.isfinite(predicted)]])
    limits = float(known.min()), float(known.max())
    edges = np.histogram_bin_edges(truth, 5)
    place = np.clip(np.digitize(truth, edges) - 1, 0, 4)
    rows, middles, means = [], [], []
    for b in range(5):
        inside = predicted[(place == b) & np.isfinite(predicted)]
        if len(inside):
            middles.append(truth[place == b].mean())
            means.append(inside.mean())
            span = f"{edges[b]:.3g} to {edges[b + 1]:.3g}"
            rows.append([span, f"{np.sum(place == b):,}", f"{inside.mean():.2f}", f"{inside.std():.2f}"])
    title = f"Predicted against true {display_name(name)}"
    order = np.argsort(truth, kind="stable")
    trend = charts.Series("mean by label", np.array(middles), np.array(means), marked=True)
    plots[name] = charts.scatter_chart(title, truth[order], predicted[order], limits, trend)
    by_label = table(f"{name} in numbers", ["true label", "rows", "mean predicted", "spread"], rows)
    return [figure("Predicted against true, and the mean by label", plots[name]), figure("By true label", by_label)]


# ---- Errors ----------------------------------------------------------------------------------------------------------


def _errors(task: Mapping[str, Any], classes: list[str] | None) -> str:
    if not task.get("worst"):
        return ""
    items = [_error(one, classes) for one in task["worst"]]
    shown, more = (f'<ul class="errors">{"".join(i)}</ul>' for i in (items[:SHOWN_ERRORS], items[SHOWN_ERRORS:]))
    which = "mistakes that the model is most sure of" if classes else "predictions farthest from their labels"
    rest = collapsible(f"{len(items) - SHOWN_ERRORS} more", more) if len(items) > SHOWN_ERRORS else ""
    return f"<h3>Worst errors</h3>{paragraph(f'The {which}, in descending order.', 'muted')}{shown}{rest}"


def _error(one: Mapping[str, Any], classes: list[str] | None) -> str:
    def label(value: Any) -> str:
        if isinstance(value, list):  # several labels an example
            return ", ".join(name for name, chosen in zip(classes or (), value, strict=False) if chosen) or "none"
        return "-" if value is None else classes[int(value)] if classes else f"{value:.3g}"

    sure = f" ({one['probability']:.0%} sure)" if "probability" in numbers(one) else ""
    quotes = "".join(f"<q>{escape(str(sentence))}</q>" for sentence in one.get("sentences", ()))
    predicted, truth = escape(label(one.get("prediction"))), escape(label(one.get("label")))
    name = f'<span class="muted">{escape(str(one.get("id", "")))}</span>'
    return f"<li>predicted <b>{predicted}</b>{sure}, in truth <b>{truth}</b> {name}{quotes}</li>"
