# SPDX-License-Identifier: Apache-2.0
"""report.html: one self-contained page about a training run, made from the files under its `--output` alone.

The charts are written to `plots/` as well. A section whose data the run did not record says so in one line.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from minbert_fast.reporting import charts
from minbert_fast.reporting.curves import curves
from minbert_fast.reporting.next_steps import next_steps, without_surgery
from minbert_fast.reporting.page import (
    Html,
    Plots,
    collapsible,
    figure,
    figure_grid,
    format_duration,
    paragraph,
    table,
    write_page,
)
from minbert_fast.reporting.runs import Run, display_name, display_title, flatten, format_score, numbers, read_run
from minbert_fast.reporting.task_sections import task_section
from minbert_fast.reporting.verdicts import Verdict, fallen_score, primary_metric, verdicts
from minbert_fast.tasks.metrics import course_score

SHOWN_NOTICES = 3  # more are folded
COURSE = {  # the metrics in the course's score, and how it scales them
    "sentiment_accuracy": "sentiment accuracy",
    "paraphrase_accuracy": "paraphrase accuracy",
    "similarity_pearson": "(similarity Pearson + 1) / 2",
}
NOISE = 0.05  # cosines of gradients between -NOISE and NOISE are those of directions without any relation


def write_report(directory: Path) -> Path:
    """Writes report.html and plots/ into a run's directory; returns the page's path.

    Raises ConfigError if the directory holds no run.
    """
    run = read_run(directory)
    plots: Plots = {}  # filled by the sections
    sections = [
        ("Other scores", _other_scores(run)),
        ("Curves", curves(run, plots)),
        *((display_title(name), task_section(name, task, plots)) for name, task in run.tasks.items()),
        ("Gradient conflicts", _conflicts(run, plots)),
        ("Where the time went", _time(run)),
        ("Environment", _environment(run)),
    ]
    return write_page(directory / "report.html", f"{run.name}: report", sections, _header(run), plots)


def headline_order(metric: str) -> int:
    """Sort key of metrics: the overall score first, the losses last."""
    return 0 if metric == "score" else 2 if metric.endswith("_loss") else 1


# ---- The top of the page: did it go well, what next? -----------------------------------------------------------------


def _header(run: Run) -> str:
    summary = run.summary
    steps, seconds = summary.get("steps"), summary.get("seconds")
    facts = [str(summary.get("recipe") or run.recipe.get("name") or "")]
    facts += [f"{steps:,} steps"] if isinstance(steps, int) else []
    facts += [format_duration(seconds)] if isinstance(seconds, int | float) else []
    facts += [str(summary[key]) for key in ("device", "precision", "backend") if summary.get(key)]
    parts = [f"<h1>{escape(run.name)}</h1>"]
    found = verdicts(run)
    fallen = ", ".join(verdict.task for verdict in found if verdict.level == "worse")
    texts = [fallen_score(run), f"Worse than before training: {fallen}" if fallen else ""]
    parts += [paragraph(f"{text}.", "banner worse") for text in texts if text]
    parts.append(paragraph(" · ".join(f for f in facts if f), "muted"))
    description = summary.get("description") or run.recipe.get("description")
    if description:
        parts.append(paragraph(str(description)))
    if summary.get("demonstration"):
        text = "A demonstration: a tiny model on sample data that ship with the package. Its scores mean nothing else."
        parts.append(paragraph(text, "banner"))
    parts.append(f'<div class="tiles">{_score_tile(run)}{"".join(_verdict_tile(run, v) for v in found)}</div>')
    if advice := next_steps(run):
        items = [f"<li>{escape(a.reason)}{f'<pre>{escape(a.command)}</pre>' if a.command else ''}</li>" for a in advice]
        parts.append(f"<h2>What next?</h2><ol>{''.join(items)}</ol>")
    parts += [paragraph(notice, "banner") for notice in run.notices]
    notices = [paragraph(str(notice), "banner") for notice in summary.get("notices") or ()]
    folded = len(notices) > SHOWN_NOTICES
    parts.append(collapsible(f"{len(notices)} notices", "".join(notices)) if folded else "".join(notices))
    return "".join(parts)


def _score_tile(run: Run) -> str:
    """The overall score, and how it is made."""
    if "score" not in run.dev:
        return "" if run.dev else paragraph("No dev scores: the run was not evaluated, or wrote no summary yet.")
    best = numbers(run.summary.get("best"))
    facts = _other_values(run, "score")
    made, course = "The mean of the tasks' judging metrics", course_metrics(run)
    if course:
        made = f"({' + '.join(COURSE[key] for key in course)}) / {len(course)}"
        if others := [name for name, task in run.tasks.items() if primary_metric(task) not in COURSE]:
            made += f", without {', '.join(others)}"
    step = f"; dev scores of step {best['step']:,.0f}, the best" if "step" in best else ""
    return _tile("", "Overall score", f"{run.dev['score']:.3f}", [*facts, f"{made}{step}."])


def course_metrics(run: Run) -> list[str]:
    """The metrics in the overall score if it is the course's; none if it is the mean of all tasks' judging metrics.

    It is that mean as soon as one task is the user's own. The numbers tell which one the run has.
    """
    course, score = course_score(run.dev), run.dev.get("score", math.nan)
    if course is None or not math.isclose(course, score, abs_tol=1e-6):
        return []
    return [key for key in COURSE if key in run.dev]


def _verdict_tile(run: Run, verdict: Verdict) -> str:
    key = f"{verdict.task}_{verdict.metric}"
    facts = _other_values(run, key)
    if verdict.constant is not None:
        facts.insert(1 if verdict.before is not None else 0, f"{verdict.constant:.3f} for {verdict.constant_name}")
    value = "not a number" if np.isnan(verdict.value) else f"{verdict.value:.3f}"
    title = f"{display_title(verdict.task)}: {display_name(verdict.metric)}"
    text = verdict.text[:1].upper() + verdict.text[1:] + "."
    facts = facts if np.isnan(verdict.error) else [f"± {verdict.error:.3f} standard error", *facts]
    return _tile(verdict.level, title, value, facts, text)


def _other_values(run: Run, key: str) -> list[str]:
    """A metric before training, on training rows, and as published, as far as they are known."""
    columns = [(run.untrained, "before training"), (run.train, "on training rows"), (run.published, "published")]
    return [f"{values[key]:.3f} {words}" for values, words in columns if key in values]


def _tile(kind: str, title: str, value: str, facts: Sequence[str], text: str = "") -> str:
    lines = "".join(f"<span class='muted'>{escape(fact)}</span>" for fact in facts)
    head = f"<span>{escape(title)}</span><b>{escape(value)}</b>"
    verdict = f'<span class="verdict">{escape(text)}</span>' if text else ""
    return f'<div class="tile {kind}">{head}{lines}{verdict}</div>'


# ---- The sections, in the order of the page ------------------------------------------------------------------------


def _other_scores(run: Run) -> str:
    """The metrics that the tiles do not show."""
    shown = {"score", *map(primary_metric, run.tasks.values())}
    columns = [("before training", run.untrained), ("dev", run.dev), ("train", run.train), ("published", run.published)]
    keys = sorted((key for key in run.dev if key not in shown), key=headline_order)
    columns = [(name, values) for name, values in columns if values.keys() & set(keys)]
    rows = [[display_name(key), *(format_score(values.get(key)) for _, values in columns)] for key in keys]
    return table("Other scores", ["metric", *(name for name, _ in columns)], rows) if rows else ""


def _conflicts(run: Run, plots: Plots) -> str:
    pairs = run.keys("cosine/")
    if not pairs:
        return paragraph("No gradient cosines were logged: the run had one task, or summed the gradients of all tasks.")
    series, rows = [], []
    logged: set[float] = set()
    conflicting: set[float] = set()
    for key in pairs:
        name = display_name(key.removeprefix("cosine/").replace("|", " · "))
        steps, values = run.column(key)
        series.append(charts.Series(name, steps, values, smooth=True))
        cosines = values[np.isfinite(values)]
        share, mean = float((cosines < -NOISE).mean()), float(cosines.mean())
        noise = " (noise)" if abs(mean) < NOISE else ""
        rows.append([f"{name}{noise}", f"{mean:+.3f}", f"{cosines.min():+.3f}", f"{share:.1%}", _bar(share)])
        logged |= set(steps[np.isfinite(values)].tolist())
        conflicting |= set(steps[values < -NOISE].tolist())
    label = "Cosine between the tasks' gradients over the steps"
    plots["cosine"] = charts.line_chart(label, series, "step", marks=run.stage_steps())
    text = (
        f"In {len(conflicting) / len(logged):.1%} of the {len(logged):,} logged steps at least one pair of tasks pulled the "
        f"shared encoder in opposing directions: a cosine of their gradients below -{NOISE}. Values nearer to 0 are noise. "
    )
    commands = ""
    if run.surgery == "none":
        text += "No surgery was applied."
    else:
        text += f"Surgery ({run.surgery}) was applied. Whether it helped, only the same run without it can tell:"
        if command := without_surgery(run):
            runs = " ".join(shlex.quote(f"{run.directory}{suffix}") for suffix in ("-no-surgery", ""))
            commands = f"<pre>{escape(command)}\npython -m minbert_fast.report {escape(runs)}</pre>"
    head = ["tasks", "mean", "lowest", "in conflict", ""]
    by_pair = table("Cosines and steps in conflict by pair of tasks", head, rows)
    figures = [figure("Cosine between task gradients", plots["cosine"]), figure("By pair of tasks", by_pair)]
    return paragraph(text) + commands + figure_grid(figures)


def _time(run: Run) -> str:
    timings = numbers(run.summary.get("timings"))
    total = run.summary.get("seconds")
    if isinstance(total, int | float) and total > sum(timings.values()):
        timings["other"] = timings.get("other", 0.0) + total - sum(timings.values())
    whole = sum(timings.values())
    if whole <= 0:
        return paragraph("The run recorded no times.")
    names = {"steps": "rest of the steps"} if "forward" in timings else {}
    rows = [
        [display_name(names.get(name, name)), format_duration(seconds), f"{seconds / whole:.1%}", _bar(seconds / whole)]
        for name, seconds in sorted(timings.items(), key=lambda item: -item[1])
    ]
    text = ""
    seconds = run.finite("step_seconds")
    if len(seconds):
        text = f"A step took {1000 * float(np.median(seconds)):,.1f} ms in the median of the logged ones"
        if np.isfinite(run.epoch_seconds):
            text += f", an epoch of steps {format_duration(run.epoch_seconds)}"
        tokens = run.summary.get("tokens")
        if isinstance(tokens, int) and run.training_seconds > 0:
            text += f"; {tokens / run.training_seconds:,.0f} tokens a second while training"
    return table("Time by part", ["part", "time", "share", ""], rows) + (paragraph(f"{text}.") if text else "")


def _environment(run: Run) -> str:
    parts = []
    command = run.summary.get("command")
    if command:
        parts += ["<h3>To reproduce</h3>", f"<pre>{escape(str(command))}</pre>"]
    keys = ("device", "precision", "backend", "commit", "seed", "tokens")
    facts = [[key, str(run.summary[key])] for key in keys if run.summary.get(key) is not None]
    facts += [[name, str(version)] for name, version in (run.summary.get("versions") or {}).items()]
    parts.append(table("Environment", ["what", "value"], facts, text_columns=2) if facts else "")
    settings = [[key, str(value)] for key, value in flatten(run.recipe).items() if value != ""]
    if settings:
        parts.append(collapsible("All settings", table("Settings", ["setting", "value"], settings, text_columns=2)))
    return "".join(parts)


def _bar(share: float) -> str:
    return Html(f'<span class="bar" style="--share: {min(max(share, 0.0), 1.0):.3f}"></span>')
