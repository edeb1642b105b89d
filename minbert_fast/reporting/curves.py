# SPDX-License-Identifier: Apache-2.0
"""The curves of a run, for its report: scores, train against dev, losses, loss weights, learning rate, gradient norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minbert_fast.reporting import charts
from minbert_fast.reporting.page import Plots, collapsible, figure, figure_grid, paragraph, table
from minbert_fast.reporting.runs import Run, display_name, format_score, numbers
from minbert_fast.reporting.verdicts import primary_metric
from minbert_fast.tasks.metrics import lower_is_better

SHOWN_EVALUATIONS = 60


class _Curve(NamedTuple):
    """One figure of curves: the name of its file, its label for screen readers, and the caption below it."""

    name: str
    label: str
    caption: str
    series: list[charts.Series]
    x: str = "step"


def curves(run: Run, plots: Plots) -> str:
    """The section of a report: all figures, and their values in folded tables."""
    scores = _scored(run)
    figures, marks = [], run.stage_steps()
    for curve in (*_score_curves(run, scores), *_overfitting_curves(run), *_loss_curves(run), *_step_curves(run)):
        plots[curve.name] = charts.line_chart(
            curve.label, curve.series, curve.x, marks=marks if curve.x == "step" else ()
        )
        figures.append(figure(curve.caption, plots[curve.name]))
    if not figures:
        return paragraph("No curves: metrics.jsonl has no values.")
    text = "Thin lines are the logged values, thick ones their running mean."
    text += " Dotted vertical lines: the next stage begins." if marks else ""
    text += " A training loss is measured with dropout, a dev loss without." if run.keys("loss/") else ""
    evaluations = _evaluations(run, scores) if scores else ""
    folded = collapsible("The curves in numbers", evaluations + _loss_table(run))
    return paragraph(text, "muted") + figure_grid(figures) + folded


def _primary(run: Run) -> list[str]:
    """One metric of each task."""
    primary = [key for task in run.tasks.values() if (key := primary_metric(task))]
    return primary or [k.removeprefix("dev/") for k in run.keys("dev/") if k.endswith(("_accuracy", "_pearson"))]


def _scored(run: Run) -> list[str]:
    """The keys of those metrics and of the overall score that have dev values."""
    return [f"dev/{key}" for key in (*_primary(run), "score") if len(run.finite(f"dev/{key}"))]


def _series(run: Run, keys: list[str], marked: bool = False) -> list[charts.Series]:
    return [charts.Series(display_name(key.partition("/")[2]), *run.column(key), marked=marked) for key in keys]


def _score_curves(run: Run, scores: list[str]) -> Iterator[_Curve]:
    for name, lower, words in (("dev", False, "Dev scores"), ("dev-errors", True, "Dev errors")):
        if chosen := [key for key in scores if lower_is_better(key) == lower]:
            caption = words if len(chosen) > 1 else f"{words}: {display_name(chosen[0].removeprefix('dev/'))}"
            yield _Curve(name, f"{words} over the steps", caption, _series(run, chosen, marked=True))


def _overfitting_curves(run: Run) -> Iterator[_Curve]:
    for key in _primary(run):
        if len(run.finite(f"train/{key}")):
            pair = [charts.Series(n, *run.column(f"{n}/{key}", "epoch"), marked=True) for n in ("train", "dev")]
            title = f"Train against dev: {display_name(key)}"
            yield _Curve(f"overfitting-{key}", f"{title}, by epoch", title, pair, "epoch")


def _loss_curves(run: Run) -> Iterator[_Curve]:
    for key in run.keys("loss/"):
        name = key.removeprefix("loss/")
        words, held_out = display_name(name), f"dev/{name}_loss"
        lines = [charts.Series("training", *run.column(key), smooth=True)]
        if len(run.finite(held_out)):
            lines.append(charts.Series("dev", *run.column(held_out), marked=True))
        yield _Curve(f"loss-{name}", f"Loss of {words}", f"Loss: {words}", lines)


def _step_curves(run: Run) -> Iterator[_Curve]:
    """What does not belong to one task alone: dynamic weights, the learning rate, the gradient norm."""
    if weights := run.keys("weight/"):
        label = "Dynamic weights of the tasks' losses"
        yield _Curve("weights", label, "Dynamic weights of the losses", _series(run, weights))
    for key, caption in (("lr", "Learning rate"), ("grad_norm", "Gradient norm before clipping")):
        if len(run.finite(key)):
            one = charts.Series(caption, *run.column(key), smooth=key == "grad_norm")
            yield _Curve(key, f"{caption} over the steps", caption, [one])


def _loss_table(run: Run) -> str:
    rows = []
    for key in run.keys("loss/"):
        losses = run.finite(key)
        if len(losses):
            tenth = max(1, len(losses) // 10)
            values = (losses[:tenth].mean(), losses[-tenth:].mean(), losses.min())
            rows.append([display_name(key.removeprefix("loss/")), *(f"{value:.4g}" for value in values)])
    return table("Training losses", ["loss", "first tenth", "last tenth", "lowest"], rows) if rows else ""


def _evaluations(run: Run, keys: list[str]) -> str:
    rows = [
        [f"{record['step']:,}", *(format_score(numbers(record).get(k)) for k in keys)]
        for record in run.records
        if any(k in record for k in keys)
    ]
    head = ["step", *(display_name(k.removeprefix("dev/")) for k in keys)]
    return table("Evaluations", head, rows[-SHOWN_EVALUATIONS:], text_columns=0)
