# SPDX-License-Identifier: Apache-2.0
"""Several runs on one self-contained page: scores, curves in one chart, times, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from minbert_fast.common.storage import write_text
from minbert_fast.reporting import charts
from minbert_fast.reporting.page import Html, document, figure, figure_grid, format_duration, paragraph, table
from minbert_fast.reporting.report import display_name, headline_order
from minbert_fast.reporting.runs import Run, flatten, format_score, read_run


def write_comparison(directories: Sequence[Path], path: Path) -> Path:
    """Writes a page that compares the runs in `directories` to `path`, and returns `path`.

    Raises ConfigError if a directory holds no run.
    """
    found = [read_run(directory) for directory in directories]
    names = [run.name for run in found]
    runs = {str(run.directory) if names.count(run.name) > 1 else run.name: run for run in found}
    head = f"<h1>{len(runs)} runs compared</h1>" + paragraph(" · ".join(runs), "muted")
    head += "".join(paragraph(f"{name}: {text}", "banner") for name, run in runs.items() for text in run.notices)
    sections = [
        ("Scores", _scores(runs)),
        ("Curves", _curves(runs)),
        ("Gradient conflicts", _conflicts(runs)),
        ("Time", _time(runs)),
        ("Settings that differ", _settings(runs)),
        ("To reproduce", _commands(runs)),
    ]
    write_text(path, document("Runs compared", sections, head))
    return path


def _scores(runs: dict[str, Run]) -> str:
    keys = sorted({key: None for run in runs.values() for key in run.dev}, key=headline_order)
    if not keys:
        return paragraph("None of the runs has dev scores.")
    best = {key: max((run.dev[key] for run in runs.values() if key in run.dev), default=np.nan) for key in keys}
    rows = []
    for name, run in runs.items():
        cells = [format_score(run.dev.get(key)) for key in keys]
        bold = [Html(f"<b>{c}</b>") if run.dev.get(key) == best[key] else c for key, c in zip(keys, cells, strict=True)]
        rows.append([name, *bold])
    head = ["run", *map(display_name, keys)]
    return paragraph("The best of each column is bold.", "muted") + table("Scores", head, rows)


def _curves(runs: dict[str, Run]) -> str:
    keys = {key: None for run in runs.values() for key in (*run.keys("dev/"), *run.keys("loss/"))}
    figures = []
    for key in sorted(keys, key=lambda k: k != "dev/score"):
        kind, _, name = key.partition("/")
        caption = f"Dev {display_name(name)}" if kind == "dev" else f"Training loss: {display_name(name)}"
        series = [
            charts.Series(run_name, *run.column(key), marked=kind == "dev", smooth=kind == "loss")
            for run_name, run in runs.items()
        ]
        figures.append(figure(caption, charts.line_chart(f"{caption}, by run", series, "step")))
    return figure_grid(figures) if figures else paragraph("None of the runs has curves.")


def _conflicts(runs: dict[str, Run]) -> str:
    pairs = {key: None for run in runs.values() for key in run.keys("cosine/")}

    def cell(cosines: np.ndarray) -> str:
        return f"{cosines.mean():+.3f}, {(cosines < 0).mean():.0%} apart" if len(cosines) else "-"

    rows = [[name, *(cell(run.finite(key)) for key in pairs)] for name, run in runs.items()]
    heads = [display_name(key.removeprefix("cosine/").replace("|", " · ")) for key in pairs]
    return table("Mean cosine and share of steps in conflict", ["run", *heads], rows) if pairs else ""


def _time(runs: dict[str, Run]) -> str:
    rows = []
    for name, run in runs.items():
        seconds = run.finite("step_seconds")
        total = run.summary.get("seconds")
        on = ", ".join(str(run.summary[k]) for k in ("device", "precision", "backend") if run.summary.get(k))
        median = f"{1000 * float(np.median(seconds)):,.1f} ms" if len(seconds) else "-"
        whole = format_duration(total) if isinstance(total, int | float) else "-"
        rows.append([name, on or "-", str(run.summary.get("steps", "-")), median, whole])
    return table("Time", ["run", "on", "steps", "median step", "whole run"], rows, text_columns=2)


def _settings(runs: dict[str, Run]) -> str:
    settings = [flatten(run.recipe) for run in runs.values()]
    keys = {key: None for values in settings for key in values}
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings}) > 1]
    if not differing:
        return paragraph("The runs' settings are the same.")
    rows = [[key, *(str(values.get(key, "-")) for values in settings)] for key in differing]
    return table("Settings that differ", ["setting", *runs], rows, text_columns=1 + len(runs))


def _commands(runs: dict[str, Run]) -> str:
    commands = {name: run.summary.get("command") for name, run in runs.items()}
    return "".join(f"<h3>{escape(n)}</h3><pre>{escape(str(c))}</pre>" for n, c in commands.items() if c)
