# SPDX-License-Identifier: Apache-2.0
"""Several runs on one self-contained page: scores, what their settings differ in, curves laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from minbert_fast.common.storage import write_text
from minbert_fast.reporting import charts
from minbert_fast.reporting.page import Html, duration, figure, gallery, page, paragraph, table
from minbert_fast.reporting.report import HEADLINE, spoken
from minbert_fast.reporting.runs import Run, flat, read_run


def write_comparison(directories: Sequence[Path], path: Path) -> Path:
    """Writes a page that compares the runs in `directories`; returns its path.

    Raises ConfigError where one of them holds no run.
    """
    runs = _named([read_run(directory) for directory in directories])
    notices = [f"{name}: {notice}" for name, run in runs.items() for notice in run.notices]
    head = f"<h1>{len(runs)} runs compared</h1>" + paragraph(" · ".join(runs), "muted")
    head += "".join(paragraph(notice, "banner") for notice in notices)
    sections = [
        ("Scores", _scores(runs)),
        ("Curves", _curves(runs)),
        ("Gradient conflicts", _conflicts(runs)),
        ("Time", _time(runs)),
        ("Settings that differ", _settings(runs)),
        ("To reproduce", _commands(runs)),
    ]
    write_text(path, page("Runs compared", [(title, body) for title, body in sections if body], head))
    return path


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by their directory's name; by its whole path where names collide."""
    names = [run.name for run in runs]
    return {str(run.directory) if names.count(run.name) > 1 else run.name: run for run in runs}


def _scores(runs: dict[str, Run]) -> str:
    found = {key: None for run in runs.values() for key in run.dev}
    keys = sorted(found, key=lambda k: HEADLINE.index(k) if k in HEADLINE else len(HEADLINE))
    if not keys:
        return paragraph("None of the runs has dev scores.")
    best = {key: max((run.dev[key] for run in runs.values() if key in run.dev), default=np.nan) for key in keys}
    rows = []
    for name, run in runs.items():
        cells = [f"{run.dev[key]:.4f}" if key in run.dev else "-" for key in keys]
        bold = [Html(f"<b>{c}</b>") if run.dev.get(key) == best[key] else c for key, c in zip(keys, cells, strict=True)]
        rows.append([name, *bold])
    return paragraph("The best of each column is bold.", "muted") + table("Scores", ["run", *map(spoken, keys)], rows)


def _curves(runs: dict[str, Run]) -> str:
    keys = {key: None for run in runs.values() for key in (*run.keys("dev/"), *run.keys("loss/"))}
    figures = []
    for key in sorted(keys, key=lambda k: k != "dev/score"):
        kind, _, name = key.partition("/")
        caption = f"Dev {spoken(name)}" if kind == "dev" else f"Training loss: {spoken(name)}"
        series = [
            charts.Series(run_name, *run.column(key), marked=kind == "dev", smooth=kind == "loss")
            for run_name, run in runs.items()
        ]
        figures.append(figure(caption, charts.lines(f"{caption}, by run", series, "step")))
    return gallery(figures) if figures else paragraph("None of the runs has curves.")


def _conflicts(runs: dict[str, Run]) -> str:
    pairs = {key: None for run in runs.values() for key in run.keys("cosine/")}
    rows = []
    for name, run in runs.items():
        cells = []
        for key in pairs:
            _, values = run.column(key)
            known = values[np.isfinite(values)]
            cells.append(f"{known.mean():+.3f}, {(known < 0).mean():.0%} apart" if len(known) else "-")
        rows.append([name, *cells])
    heads = [spoken(key.removeprefix("cosine/").replace("|", " · ")) for key in pairs]
    return table("Mean cosine and share of steps in conflict", ["run", *heads], rows) if pairs else ""


def _time(runs: dict[str, Run]) -> str:
    rows = []
    for name, run in runs.items():
        _, seconds = run.column("step_seconds")
        known = seconds[np.isfinite(seconds)]
        total = run.summary.get("seconds")
        rows.append(
            [
                name,
                ", ".join(str(run.summary[k]) for k in ("device", "precision", "backend") if run.summary.get(k)) or "-",
                str(run.summary.get("steps", "-")),
                f"{1000 * float(np.median(known)):,.1f} ms" if len(known) else "-",
                duration(total) if isinstance(total, int | float) else "-",
            ]
        )
    return table("Time", ["run", "on", "steps", "median step", "whole run"], rows, text_columns=2)


def _settings(runs: dict[str, Run]) -> str:
    settings = {name: flat(run.recipe) for name, run in runs.items()}
    keys = {key: None for values in settings.values() for key in values}
    differing = [key for key in keys if len({repr(values.get(key)) for values in settings.values()}) > 1]
    if not differing:
        return paragraph("The runs' settings are the same.")
    rows = [[key, *(str(values.get(key, "-")) for values in settings.values())] for key in differing]
    return table("Settings that differ", ["setting", *runs], rows, text_columns=1 + len(runs))


def _commands(runs: dict[str, Run]) -> str:
    parts = [
        f"<h3>{escape(name)}</h3><pre>{escape(str(run.summary['command']))}</pre>"
        for name, run in runs.items()
        if run.summary.get("command")
    ]
    return "".join(parts)
