# SPDX-License-Identifier: Apache-2.0
"""report.html: one self-contained page about a training run, made from the files under its `--output` alone.

The charts are written to `plots/` as well. A section whose data the run did not record says so in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common.storage import write_text
from minbert_fast.reporting import charts
from minbert_fast.reporting.page import (
    Html,
    collapsible,
    document,
    figure,
    figure_grid,
    format_duration,
    paragraph,
    scrollable,
    table,
)
from minbert_fast.reporting.runs import TRAINING_PARTS, Run, flatten, format_score, numbers, read_run
from minbert_fast.tasks.metrics import normalised_confusion

SHOWN_ERRORS = 6  # per task; a click shows the others
SHOWN_EVALUATIONS = 60
HEADLINE = ("score", "sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson")


def write_report(directory: Path) -> Path:
    """Writes report.html and plots/ into a run's directory; returns the page's path.

    Raises ConfigError if the directory holds no run.
    """
    run = read_run(directory)
    plots: dict[str, str] = {}  # SVG text by file name, filled by the sections
    sections = [
        ("Scores", _scores(run)),
        ("Curves", _curves(run, plots)),
        ("Gradient conflicts", _conflicts(run, plots)),
        ("Confusion matrices", _confusions(run, plots)),
        ("Similarity", _similarity(run, plots)),
        ("Worst errors", _errors(run)),
        ("Where the time went", _time(run)),
        ("Environment", _environment(run)),
    ]
    path = directory / "report.html"
    write_text(path, document(f"{run.name}: report", sections, _header(run)))
    for name, svg in plots.items():
        write_text(directory / "plots" / f"{name}.svg", charts.standalone_svg(svg))
    return path


def display_name(name: str) -> str:
    """The name of a metric or task as a reader sees it."""
    words = name.replace("_", " ").replace("macro f1", "macro-F1")
    return words.replace("pearson", "Pearson").replace("spearman", "Spearman").replace("matthews", "Matthews")


def display_title(name: str) -> str:
    """`display_name` with a capital first letter."""
    words = display_name(name)
    return words[:1].upper() + words[1:]


def headline_order(metric: str) -> int:
    """Sort key that puts the metrics of HEADLINE first."""
    return HEADLINE.index(metric) if metric in HEADLINE else len(HEADLINE)


# ---- The sections, in the order of the page ------------------------------------------------------------------------


def _header(run: Run) -> str:
    summary = run.summary
    steps, seconds = summary.get("steps"), summary.get("seconds")
    facts = [str(summary.get("recipe") or run.recipe.get("name") or "")]
    facts += [f"{steps:,} steps"] if isinstance(steps, int) else []
    facts += [format_duration(seconds)] if isinstance(seconds, int | float) else []
    facts += [str(summary[key]) for key in ("device", "precision", "backend") if summary.get(key)]
    parts = [f"<h1>{escape(run.name)}</h1>", paragraph(" · ".join(f for f in facts if f), "muted")]
    description = summary.get("description") or run.recipe.get("description")
    if description:
        parts.append(paragraph(str(description)))
    if summary.get("demonstration"):
        text = "A demonstration: a tiny model on sample data that ship with the package. Its scores mean nothing else."
        parts.append(paragraph(text, "banner"))
    untrained = numbers(summary.get("untrained"))
    tiles = []
    for name in HEADLINE:
        if name in run.dev:
            before = f"<span class='muted'>{untrained[name]:.3f} untrained</span>" if name in untrained else ""
            title = escape(display_title(name))
            tiles.append(f"<div class='tile'><span>{title}</span><b>{run.dev[name]:.3f}</b>{before}</div>")
    parts.append(f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "")
    parts += [paragraph(notice, "banner") for notice in [*run.notices, *map(str, summary.get("notices") or ())]]
    return "".join(parts)


def _scores(run: Run) -> str:
    if not run.dev:
        return paragraph("No dev scores: the run was not evaluated, or ended before it wrote its summary.")
    untrained, published = (
        numbers(run.summary.get("untrained")),
        numbers((run.recipe.get("published") or {}).get("dev")),
    )
    columns = [("untrained", untrained), ("best model", run.dev), ("published", published)]
    columns = [(name, values) for name, values in columns if values.keys() & run.dev.keys()]
    rows = [
        [display_name(key), *(format_score(values.get(key)) for _, values in columns)]
        for key in sorted(run.dev, key=headline_order)
    ]
    best = numbers(run.summary.get("best"))
    text = f"Dev scores of the best model, that of step {best['step']:,.0f}. " if "step" in best else ""
    text += (
        "score = (sentiment accuracy + paraphrase accuracy + (similarity Pearson + 1) / 2) / 3, of the tasks present."
    )
    return paragraph(text) + table("Dev scores", ["metric", *(name for name, _ in columns)], rows)


def _curves(run: Run, plots: dict[str, str]) -> str:
    figures: list[str] = []
    marks = run.stage_steps()

    def add(name: str, label: str, caption: str, series: list[charts.Series]) -> None:
        plots[name] = charts.line_chart(label, series, "step", marks=marks)
        figures.append(figure(caption, plots[name]))

    def series_of(keys: list[str], marked: bool = False) -> list[charts.Series]:
        return [charts.Series(display_name(key.partition("/")[2]), *run.column(key), marked=marked) for key in keys]

    # One metric per task and the overall score.
    scores = [key for key in run.keys("dev/") if key == "dev/score" or key.endswith(("_accuracy", "_pearson"))]
    if scores:
        add("dev", "Dev scores over the steps", "Dev scores", series_of(scores, marked=True))
    rows = []
    for key in run.keys("loss/"):
        name = key.removeprefix("loss/")
        words = display_name(name)
        one = charts.Series(words, *run.column(key), smooth=True)
        add(f"loss-{name}", f"Training loss of {words}", f"Training loss: {words}", [one])
        losses = run.finite(key)
        if len(losses):
            tenth = max(1, len(losses) // 10)
            means = losses[:tenth].mean(), losses[-tenth:].mean()
            rows.append([words, *(f"{value:.4g}" for value in (*means, losses.min()))])
    if weights := run.keys("weight/"):
        label = "Dynamic weights of the tasks' losses"
        add("weights", label, "Dynamic weights of the losses", series_of(weights))
    for key, caption in (("lr", "Learning rate"), ("grad_norm", "Gradient norm before clipping")):
        if len(run.finite(key)):
            one = charts.Series(caption, *run.column(key), smooth=key == "grad_norm")
            add(key, f"{caption} over the steps", caption, [one])
    if not figures:
        return paragraph("No curves: metrics.jsonl has no values.")
    text = "Thin lines are the logged values, thick ones their running mean."
    text += " Dotted vertical lines: the next stage begins." if marks else ""
    losses_table = table("Training losses", ["loss", "first tenth", "last tenth", "lowest"], rows) if rows else ""
    evaluations = _evaluations(run, scores) if scores else ""
    folded = collapsible("The curves in numbers", evaluations + losses_table)
    return paragraph(text, "muted") + figure_grid(figures) + folded


def _evaluations(run: Run, keys: list[str]) -> str:
    rows = [
        [f"{record['step']:,}", *(format_score(numbers(record).get(k)) for k in keys)]
        for record in run.records
        if any(k in record for k in keys)
    ]
    head = ["step", *(display_name(k.removeprefix("dev/")) for k in keys)]
    return table("Evaluations", head, rows[-SHOWN_EVALUATIONS:], text_columns=0)


def _conflicts(run: Run, plots: dict[str, str]) -> str:
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
        share = float((cosines < 0).mean())
        rows.append([name, f"{cosines.mean():+.3f}", f"{cosines.min():+.3f}", f"{share:.1%}", _bar(share)])
        logged |= set(steps[np.isfinite(values)].tolist())
        conflicting |= set(steps[values < 0].tolist())
    label = "Cosine between the tasks' gradients over the steps"
    plots["cosine"] = charts.line_chart(label, series, "step", marks=run.stage_steps())
    figures = [figure("Cosine between task gradients", plots["cosine"])]
    method = str((run.recipe.get("surgery") or {}).get("method", "none"))
    text = (
        f"In {len(conflicting) / len(logged):.1%} of the {len(logged):,} logged steps at least one pair of tasks pulled the "
        "shared encoder in opposing directions (a negative inner product of their gradients). "
    )
    text += (
        "No surgery was applied: the gradients were added as they are."
        if method == "none"
        else f"Surgery ({method}) changed the gradients in these steps so that tasks undo less of each other's progress."
    )
    if len(run.finite("conflicts")):
        title = "Share of task pairs in conflict"
        one = charts.Series("conflicts", *run.column("conflicts"), smooth=True)
        plots["conflicts"] = charts.line_chart(f"{title} over the steps", [one], "step", (0.0, 1.0), run.stage_steps())
        figures.append(figure(title, plots["conflicts"]))
    head = ["tasks", "mean cosine", "lowest", "steps in conflict", ""]
    return paragraph(text) + figure_grid(figures) + table("Conflicts by pair of tasks", head, rows)


def _confusions(run: Run, plots: dict[str, str]) -> str:
    parts = []
    for name, task in _tasks(run).items():
        counts, classes = task.get("confusion"), task.get("classes")
        if not counts or not classes:
            continue
        raw = np.array(counts)
        shares = normalised_confusion(raw)
        label = f"Confusion matrix of {display_name(name)}"
        plots[f"confusion-{name}"] = charts.matrix_chart(f"{label}, counts", raw, classes, "{:,.0f}".format)
        plots[f"confusion-{name}-normalised"] = charts.matrix_chart(
            f"{label}, shares of the truth", shares, classes, "{:.2f}".format
        )
        parts.append(f"<h3>{escape(display_title(name))}</h3>")
        tables = [
            figure("Examples", _matrix(f"{name}: counts", raw, shares, classes, "{:,.0f}")),
            figure("Shares of each true class", _matrix(f"{name}: shares", shares, shares, classes, "{:.2f}")),
        ]
        parts.append(figure_grid(tables))
    if not parts:
        return paragraph("No confusion matrices: no classes were predicted.")
    return paragraph("Rows are the truth, columns the prediction.", "muted") + "".join(parts)


def _matrix(label: str, values: np.ndarray, shares: np.ndarray, classes: list[str], form: str) -> str:
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


def _similarity(run: Run, plots: dict[str, str]) -> str:
    parts = []
    for name, task in _tasks(run).items():
        if task.get("classes") or not task.get("labels"):
            continue
        truth, predicted = (
            np.array([np.nan if v is None else v for v in task[k]], float) for k in ("labels", "predictions")
        )
        order = np.argsort(truth, kind="stable")
        title = f"Predicted against true {display_name(name)}"
        plots[name] = charts.scatter_chart(title, truth[order], predicted[order], "truth", "predicted", (0.0, 5.0))
        rows = []
        for low in range(5):
            chosen = (truth >= low) & ((truth < low + 1) | (low == 4))
            if chosen.any():
                inside = predicted[chosen]
                rows.append([f"{low} to {low + 1}", f"{chosen.sum():,}", f"{inside.mean():.2f}", f"{inside.std():.2f}"])
        by_label = table(f"{name} in numbers", ["true label", "pairs", "mean predicted", "spread"], rows)
        parts.append(figure_grid([figure(title, plots[name]), figure("By true label", by_label)]))
    return "".join(parts)


def _errors(run: Run) -> str:
    parts = []
    for name, task in _tasks(run).items():
        if not task.get("worst"):
            continue
        items = [_error(one, task.get("classes")) for one in task["worst"]]
        shown, more = (f'<ul class="errors">{"".join(i)}</ul>' for i in (items[:SHOWN_ERRORS], items[SHOWN_ERRORS:]))
        parts.append(f"<h3>{escape(display_title(name))}</h3>{shown}")
        if len(items) > SHOWN_ERRORS:
            parts.append(collapsible(f"{len(items) - SHOWN_ERRORS} more", more))
    if not parts:
        return paragraph("No errors are listed: predictions/details.json has none.")
    text = "The dev examples with the largest errors of the best model, in descending order."
    return paragraph(text, "muted") + "".join(parts)


def _error(one: Mapping[str, Any], classes: list[str] | None) -> str:
    def label(value: Any) -> str:
        return classes[int(value)] if classes and value is not None else f"{value:.1f}" if value is not None else "-"

    sure = f" ({one['probability']:.0%} sure)" if "probability" in numbers(one) else ""
    quotes = "".join(f"<q>{escape(str(sentence))}</q>" for sentence in one.get("sentences", ()))
    predicted, truth = escape(label(one.get("prediction"))), escape(label(one.get("label")))
    name = f'<span class="muted">{escape(str(one.get("id", "")))}</span>'
    return f"<li><b>{predicted}</b>{sure}, in truth <b>{truth}</b> {name}{quotes}</li>"


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
        training = sum(timings.get(part, 0.0) for part in TRAINING_PARTS)
        tokens = run.summary.get("tokens")
        if isinstance(tokens, int) and training > 0:
            text += f"; {tokens / training:,.0f} tokens a second while training"
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


# ---- Helpers -------------------------------------------------------------------------------------------------------


def _tasks(run: Run) -> dict[str, dict[str, Any]]:
    tasks = run.details.get("tasks")
    return tasks if isinstance(tasks, dict) else {}


def _bar(share: float) -> str:
    return Html(f'<span class="bar" style="--share: {min(max(share, 0.0), 1.0):.3f}"></span>')
