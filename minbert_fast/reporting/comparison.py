# SPDX-License-Identifier: Apache-2.0
"""Several runs on one self-contained page: scores, curves in one chart, times, and the settings that differ.

Scores compare only on the same rows, so the page begins with a warning where the runs' dev sets differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.reporting import charts
from minbert_fast.reporting.page import Html, figure, figure_grid, format_duration, paragraph, table, write_page
from minbert_fast.reporting.report import NOISE, course_metrics, headline_order
from minbert_fast.reporting.runs import Run, display_name, flatten, format_score, read_run
from minbert_fast.reporting.verdicts import primary_metric, verdicts
from minbert_fast.tasks.metrics import lower_is_better


def write_comparison(directories: Sequence[Path], path: Path) -> Path:
    """Writes a page that compares the runs in `directories` to `path`, and returns `path`.

    Raises ConfigError if a directory holds no run.
    """
    found = [read_run(directory) for directory in directories]
    names = [run.name for run in found]
    runs = {str(run.directory) if names.count(run.name) > 1 else run.name: run for run in found}
    head = f"<h1>{len(runs)} runs compared</h1>" + paragraph(" · ".join(runs), "muted")
    head += "".join(paragraph(f"{name}: {text}", "banner") for name, run in runs.items() for text in run.notices)
    head += "".join(paragraph(text, "banner worse") for text in (*differing_dev_sets(runs), *differing_tasks(runs)))
    sections = [
        ("Scores", _scores(runs)),
        ("Curves", _curves(runs)),
        ("Gradient conflicts", _conflicts(runs)),
        ("Time", _time(runs)),
        ("Settings that differ", _settings(runs)),
        ("To reproduce", _commands(runs)),
    ]
    return write_page(path, "Runs compared", sections, head, {})


def differing_dev_sets(runs: Mapping[str, Run]) -> list[str]:
    """A sentence on each task whose dev rows (ids and labels) are not the same in all runs that have it."""
    found = []
    for task in dict.fromkeys(name for run in runs.values() for name in run.tasks):
        sets: dict[str, list[str]] = {}
        for name, run in runs.items():
            if task in run.tasks:
                rows = [run.tasks[task].get(key) for key in ("ids", "labels")]
                sets.setdefault(json.dumps(rows), []).append(name)
        if len(sets) > 1:
            sizes = "; ".join(f"{len(json.loads(rows)[0] or ()):,} in {', '.join(n)}" for rows, n in sets.items())
            problem = f"the runs' dev sets differ, so their scores do not compare (rows: {sizes})."
            found.append(f"{display_name(task)}: {problem}")
    return found


def differing_tasks(runs: Mapping[str, Run]) -> list[str]:
    """A sentence if the runs' overall scores are not made of the same metrics."""
    sets: dict[str, list[str]] = {}
    for name, run in runs.items():
        if "score" in run.dev:
            metrics = course_metrics(run) or filter(None, map(primary_metric, run.tasks.values()))
            sets.setdefault(", ".join(map(display_name, sorted(metrics))), []).append(name)
    if len(sets) < 2:
        return []
    listed = "; ".join(f"of {metrics or 'unknown metrics'} in {', '.join(names)}" for metrics, names in sets.items())
    return [f"Score: the runs' tasks differ, so their overall scores do not compare ({listed})."]


def _scores(runs: dict[str, Run]) -> str:
    keys = sorted({key: None for run in runs.values() for key in run.dev}, key=headline_order)
    if not keys:
        return paragraph("None of the runs has dev scores.")
    errors = {name: {f"{v.task}_{v.metric}": v.error for v in verdicts(run)} for name, run in runs.items()}
    best = {}
    for key in keys:
        choose = min if lower_is_better(key) else max
        best[key] = choose(run.dev[key] for run in runs.values() if key in run.dev)
    rows = []
    for key in keys:
        row: list[str] = [display_name(key)]
        for name, run in runs.items():
            error = errors[name].get(key, np.nan)
            cell = format_score(run.dev.get(key)) + (f" ± {error:.3f}" if np.isfinite(error) else "")
            row.append(Html(f"<b>{cell}</b>") if run.dev.get(key) == best[key] else cell)
        rows.append(row)
    text = "The best of each row is bold; a lead within the standard errors (±) may be chance."
    return paragraph(text, "muted") + table("Scores", ["metric", *runs], rows) + _surgery(runs)


def _surgery(runs: dict[str, Run]) -> str:
    """Whether surgery helped, if the runs with and without it differ in nothing else but the seed."""
    methods = {name: run.surgery for name, run in runs.items()}
    differing = {key for key in _differing([_values(run) for run in runs.values()]) if key != "training.seed"}
    same = not differing - {"surgery.method", "surgery.reduction", "name", "description"}
    if len(set(methods.values())) < 2 or not same or differing_dev_sets(runs):
        return ""
    plain = [run.dev["score"] for name, run in runs.items() if methods[name] == "none" and "score" in run.dev]
    lines = []
    for method in dict.fromkeys(m for m in methods.values() if m != "none"):
        scores = [run.dev["score"] for name, run in runs.items() if methods[name] == method and "score" in run.dev]
        if not plain or not scores:
            continue
        text = f"{method}: {np.mean(scores) - np.mean(plain):+.4f}"
        if min(len(scores), len(plain)) > 1:
            error = np.sqrt(sum(np.var(each, ddof=1) / len(each) for each in (scores, plain)))
            lines.append(f"{text} ± {error:.4f} overall score against the runs without surgery.")
        else:
            chance = "One run cannot tell a gain from chance: repeat both with several seeds."
            lines.append(f"{text} overall score against the run without surgery. {chance}")
    return "".join(map(paragraph, lines))


def _curves(runs: dict[str, Run]) -> str:
    keys = {key: None for run in runs.values() for key in (*run.keys("dev/"), *run.keys("loss/"))}
    figures = []
    for key in sorted(keys, key=lambda k: k != "dev/score"):
        kind, _, name = key.partition("/")
        caption = f"Training loss: {display_name(name)}" if kind == "loss" else f"Dev {display_name(name)}"
        series = [
            charts.Series(run_name, *run.column(key), marked=kind == "dev", smooth=kind == "loss")
            for run_name, run in runs.items()
        ]
        figures.append(figure(caption, charts.line_chart(f"{caption}, by run", series, "step")))
    return figure_grid(figures) if figures else paragraph("None of the runs has curves.")


def _conflicts(runs: dict[str, Run]) -> str:
    pairs = {key: None for run in runs.values() for key in run.keys("cosine/")}

    def cell(cosines: np.ndarray) -> str:
        return f"{cosines.mean():+.3f}, {(cosines < -NOISE).mean():.0%}" if len(cosines) else "-"

    names = {key: display_name(key.removeprefix("cosine/").replace("|", " · ")) for key in pairs}
    rows = [[names[key], *(cell(run.finite(key)) for run in runs.values())] for key in pairs]
    return table("Mean cosine and share of steps in conflict", ["tasks", *runs], rows) if pairs else ""


def _time(runs: dict[str, Run]) -> str:
    rows = []
    for name, run in runs.items():
        seconds = run.finite("step_seconds")
        total = run.summary.get("seconds")
        on = ", ".join(str(run.summary[k]) for k in ("device", "precision", "backend") if run.summary.get(k))
        median = f"{1000 * float(np.median(seconds)):,.1f} ms" if len(seconds) else "-"
        whole = format_duration(total) if isinstance(total, int | float) else "-"
        epoch = format_duration(run.epoch_seconds) if np.isfinite(run.epoch_seconds) else "-"
        rows.append([name, on or "-", str(run.summary.get("steps", "-")), median, epoch, whole])
    return table("Time", ["run", "on", "steps", "median step", "an epoch", "whole run"], rows, text_columns=2)


def _settings(runs: dict[str, Run]) -> str:
    settings = [_values(run) for run in runs.values()]
    differing = _differing(settings)
    if not differing:
        return paragraph("The runs' settings are the same.")
    rows = [[key, *(str(values.get(key, "-")) for values in settings)] for key in differing]
    return table("Settings that differ", ["setting", *runs], rows, text_columns=1 + len(runs))


def _values(run: Run) -> dict[str, Any]:
    """The run's settings, with the names of its tasks: a task without options of its own has no other setting."""
    return {"tasks": ", ".join(run.recipe.get("tasks", {}))} | flatten(run.recipe)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all settings."""
    keys = {key: None for values in settings for key in values}
    return [key for key in keys if len({repr(values.get(key)) for values in settings}) > 1]


def _commands(runs: dict[str, Run]) -> str:
    commands = {name: run.summary.get("command") for name, run in runs.items()}
    return "".join(f"<h3>{escape(n)}</h3><pre>{escape(str(c))}</pre>" for n, c in commands.items() if c)
