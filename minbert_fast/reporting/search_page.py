# SPDX-License-Identifier: Apache-2.0
"""A search on one page: each trial's score against the values that were searched, on axes of these values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common.schema import ConfigError
from minbert_fast.reporting import charts
from minbert_fast.reporting.page import Plots, figure, figure_grid, paragraph, table, write_page
from minbert_fast.reporting.runs import display_name, format_score, numbers
from minbert_fast.tasks.metrics import lower_is_better

TRIALS = "table.json"  # what `search` writes: a list of {"values", "dev", "failure", "metric"}, the best trial first
LOGARITHMIC = 8.0  # an axis whose largest value is this many times its smallest is logarithmic
SHOWN_TICKS = 6  # of an axis that names its values
SHOWN_TRIALS = 100


def holds_search(directory: Path) -> bool:
    """Whether `directory` is the output of `search`, not of a single run."""
    return (directory / TRIALS).is_file() and not (directory / "summary.json").is_file()


def write_search(directory: Path) -> Path:
    """Writes report.html and plots/ into the directory of a search; returns the page's path.

    Raises ConfigError for a file that `search` did not write.
    """
    trials = _read_trials(directory / TRIALS)
    metric = str(trials[0].get("metric", "score")) if trials else "score"
    finished = [trial for trial in trials if metric in numbers(trial.get("dev"))]
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    plots: Plots = {}
    figures = []
    for key in keys:
        varied = {str(trial["values"].get(key)) for trial in finished}
        if len(varied) > 1:
            plots[f"search-{key}"] = value_chart(key, finished, metric)
            figures.append(figure(f"{display_name(metric)} against {key}", plots[f"search-{key}"]))
    head = f"<h1>{len(trials)} trials</h1>" + paragraph(", ".join(keys), "muted")
    if finished:
        best = _ranked(finished, metric)[0]
        values = ", ".join(f"{key} = {value}" for key, value in best["values"].items())
        text = f"Best: {values}, with a dev {display_name(metric)} of {format_score(best['dev'][metric])}. "
        chance = (
            "It is the best of several on one dev set, which flatters it: confirm it on rows that no trial has seen."
        )
        head += paragraph(text + chance)
    sections = [
        ("Values", figure_grid(figures) if figures else ""),
        ("Trials", _table(keys, _ranked(finished, metric), [t for t in trials if t not in finished], metric)),
    ]
    return write_page(directory / "report.html", f"{directory.resolve().name}: search", sections, head, plots)


def value_chart(key: str, trials: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The score of each trial against its value of `key`: on a linear or logarithmic axis, or by name for other values."""
    scores = np.array([trial["dev"][metric] for trial in trials], dtype=np.float64)
    texts = [str(trial["values"].get(key)) for trial in trials]
    places, ticks, words = _axis(texts)
    series = [charts.Series("trials", places, scores, joined=False)]
    distinct = np.unique(places)
    if len(distinct) <= SHOWN_TICKS:  # of values drawn from a range, almost each is its own best
        best = [(min if lower_is_better(metric) else max)(scores[places == place]) for place in distinct]
        series.append(charts.Series("best of its value", distinct, np.array(best)))
    return charts.line_chart(f"{metric} of the trials against {key}", series, f"{key}{words}", x_ticks=ticks)


def _axis(texts: Sequence[str]) -> tuple[np.ndarray, list[tuple[float, str]] | None, str]:
    """Positions [n] of values on an axis, its ticks (None: round numbers), and a word about its scale."""
    try:
        values = np.array([float(text) for text in texts])
    except ValueError:
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        names = list(dict.fromkeys(texts))
        return np.array([float(names.index(text)) for text in texts]), [(float(i), n) for i, n in enumerate(names)], ""
    distinct = np.unique(values)
    logarithmic = distinct[0] > 0 and distinct[-1] >= LOGARITHMIC * distinct[0]
    places = np.log10(values) if logarithmic else values
    if len(distinct) <= SHOWN_TICKS:
        shown = distinct
    elif not logarithmic:
        return places, None, ""
    else:
        powers = range(math.floor(math.log10(distinct[0])), math.ceil(math.log10(distinct[-1])) + 1)
        shown = np.array([10.0**p for p in powers if distinct[0] <= 10.0**p <= distinct[-1]])
        shown = shown if len(shown) > 1 else distinct[[0, -1]]
    at = np.log10(shown) if logarithmic else shown
    ticks = [(float(a), charts.format_tick(float(value))) for a, value in zip(at, shown, strict=True)]
    return places, ticks, " (logarithmic)" if logarithmic else ""


def _ranked(trials: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    return sorted(trials, key=lambda trial: trial["dev"][metric], reverse=not lower_is_better(metric))


def _table(
    keys: Sequence[str], ranked: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]], by: str
) -> str:
    """The trials with their values and dev metrics, the best first, then those without a score and the reason."""
    metrics = list(dict.fromkeys([by, *(m for trial in ranked for m in trial["dev"] if not m.endswith("_loss"))]))
    rows = [
        [*(str(trial["values"].get(key, "-")) for key in keys), *(format_score(trial["dev"].get(m)) for m in metrics)]
        for trial in ranked[:SHOWN_TRIALS]
    ]
    parts = [table("Trials", [*keys, *map(display_name, metrics)], rows, text_columns=len(keys))] if rows else []
    lost = [[*(str(t["values"].get(key, "-")) for key in keys), str(t.get("failure") or "no score")] for t in failed]
    if lost:
        parts.append("<h3>Without a score</h3>" + table("Failed", [*keys, "reason"], lost, text_columns=len(keys) + 1))
    return "".join(parts)


def _read_trials(path: Path) -> list[Mapping[str, Any]]:
    try:
        trials = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(trials, list) or not all(
        isinstance(t, dict) and isinstance(t.get("values"), dict) for t in trials
    ):
        raise ConfigError(
            f"{path}: expected the trials of a search, a list of values and dev scores (`compare` writes its own page)"
        )
    return trials
