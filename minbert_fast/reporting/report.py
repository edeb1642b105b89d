# SPDX-License-Identifier: Apache-2.0
"""report.html: what a training run did, on one self-contained page, from the files under its `--output` alone.

The same charts are written as files to `plots/`. Whatever a run did not record is left out, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.common.storage import write_text
from minbert_fast.reporting import charts
from minbert_fast.reporting.page import Html, duration, figure, fold, gallery, page, paragraph, scroll, table
from minbert_fast.reporting.runs import TRAINING, Run, flat, read_run
from minbert_fast.tasks.metrics import normalised_confusion

SHOWN_ERRORS = 6  # a task, before the fold
HEADLINE = ("score", "sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson")


def write_report(directory: Path) -> Path:
    """Writes report.html and plots/ into a run's directory; returns the page's path.

    Raises ConfigError where the directory holds no run.
    """
    run = read_run(directory)
    plots: dict[str, str] = {}
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
    write_text(path, page(f"{run.name}: report", [(t, b) for t, b in sections if b], _header(run)))
    for name, svg in plots.items():
        write_text(directory / "plots" / f"{name}.svg", charts.standalone(svg))
    return path


def spoken(name: str) -> str:
    """A metric's or a task's name in words."""
    words = name.replace("_", " ").replace("macro f1", "macro-F1")
    return words.replace("pearson", "Pearson").replace("spearman", "Spearman").replace("matthews", "Matthews")


def titled(name: str) -> str:
    """The same at the beginning of a line."""
    words = spoken(name)
    return words[:1].upper() + words[1:]


# ---- The page from top to bottom -----------------------------------------------------------------------------------


def _header(run: Run) -> str:
    summary = run.summary
    steps, seconds = summary.get("steps"), summary.get("seconds")
    facts = [str(summary.get("recipe") or run.recipe.get("name") or "")]
    facts += [f"{steps:,} steps"] if isinstance(steps, int) else []
    facts += [duration(seconds)] if isinstance(seconds, int | float) else []
    facts += [str(summary[key]) for key in ("device", "precision", "backend") if summary.get(key)]
    parts = [f"<h1>{escape(run.name)}</h1>", paragraph(" · ".join(f for f in facts if f), "muted")]
    description = summary.get("description") or run.recipe.get("description")
    if description:
        parts.append(paragraph(str(description)))
    if summary.get("demonstration"):
        text = "A demonstration: a tiny model on sample data that ships with the package. Its scores say nothing else."
        parts.append(paragraph(text, "banner"))
    untrained = summary.get("untrained") or {}
    tiles = []
    for name in HEADLINE:
        if name in run.dev:
            before = (
                f"<span class='muted'>{untrained[name]:.3f} untrained</span>" if _is_number(untrained, name) else ""
            )
            tiles.append(
                f"<div class='tile'><span>{escape(titled(name))}</span><b>{run.dev[name]:.3f}</b>{before}</div>"
            )
    parts.append(f'<div class="tiles">{"".join(tiles)}</div>' if tiles else "")
    parts += [paragraph(notice, "banner") for notice in [*run.notices, *map(str, summary.get("notices") or ())]]
    return "".join(parts)


def _scores(run: Run) -> str:
    if not run.dev:
        return paragraph(
            "No dev scores: the run has not been evaluated, or was stopped before its summary was written."
        )
    untrained = run.summary.get("untrained") or {}
    published = run.recipe.get("published") or {}
    columns = [("untrained", untrained), ("best model", run.dev), ("published", published)]
    columns = [(name, values) for name, values in columns if any(_is_number(values, key) for key in run.dev)]
    rows = [
        [spoken(key), *(f"{values[key]:.4f}" if _is_number(values, key) else "-" for _, values in columns)]
        for key in sorted(run.dev, key=lambda k: (k not in HEADLINE, HEADLINE.index(k) if k in HEADLINE else 0))
    ]
    best = run.summary.get("best") or {}
    text = f"Dev scores of the best model, that of step {best['step']:,}. " if _is_number(best, "step") else ""
    text += (
        "score = (sentiment accuracy + paraphrase accuracy + (similarity Pearson + 1) / 2) / 3, of the tasks present."
    )
    return paragraph(text) + table("Dev scores", ["metric", *(name for name, _ in columns)], rows)


def _curves(run: Run, plots: dict[str, str]) -> str:
    figures = []
    marks = run.stage_steps()
    scores = [key for key in run.keys("dev/") if key.removeprefix("dev/") in _primary(run)]
    if scores:
        series = [charts.Series(spoken(k.removeprefix("dev/")), *run.column(k), marked=True) for k in scores]
        plots["dev"] = charts.lines("Dev scores over the steps", series, "step", marks=marks)
        figures.append(figure("Dev scores", plots["dev"]))
    rows = []
    for key in run.keys("loss/"):
        name = key.removeprefix("loss/")
        steps, values = run.column(key)
        one = charts.Series(spoken(name), steps, values, smooth=True)
        plots[f"loss-{name}"] = charts.lines(f"Training loss of {spoken(name)}", [one], "step", marks=marks)
        figures.append(figure(f"Training loss: {spoken(name)}", plots[f"loss-{name}"]))
        known = values[np.isfinite(values)]
        if len(known):
            tenth = max(1, len(known) // 10)
            rows.append(
                [spoken(name), f"{known[:tenth].mean():.4g}", f"{known[-tenth:].mean():.4g}", f"{known.min():.4g}"]
            )
    weights = run.keys("weight/")
    if weights:
        series = [charts.Series(spoken(key.removeprefix("weight/")), *run.column(key)) for key in weights]
        plots["weights"] = charts.lines("Dynamic weights of the tasks' losses", series, "step", marks=marks)
        figures.append(figure("Dynamic weights of the losses", plots["weights"]))
    for key, caption in (("lr", "Learning rate"), ("grad_norm", "Gradient norm before clipping")):
        steps, values = run.column(key)
        if np.isfinite(values).any():
            one = charts.Series(caption, steps, values, smooth=key == "grad_norm")
            plots[key] = charts.lines(f"{caption} over the steps", [one], "step", marks=marks)
            figures.append(figure(caption, plots[key]))
    if not figures:
        return paragraph("No curves: metrics.jsonl has no values.")
    text = "Thin lines are the logged values, thick ones their running mean."
    text += " Dotted vertical lines: the next stage begins." if marks else ""
    numbers = table("Training losses", ["loss", "first tenth", "last tenth", "lowest"], rows) if rows else ""
    evaluations = _evaluations(run, scores) if scores else ""
    return paragraph(text, "muted") + gallery(figures) + fold("The curves in numbers", evaluations + numbers)


def _evaluations(run: Run, keys: list[str]) -> str:
    rows = [
        [f"{record['step']:,}", *(f"{record[k]:.4f}" if _is_number(record, k) else "-" for k in keys)]
        for record in run.records
        if any(k in record for k in keys)
    ]
    return table("Evaluations", ["step", *(spoken(k.removeprefix("dev/")) for k in keys)], rows[-60:], text_columns=0)


def _conflicts(run: Run, plots: dict[str, str]) -> str:
    pairs = run.keys("cosine/")
    if not pairs:
        return paragraph(
            "No gradient cosines were logged: the run had one task, or did not keep the tasks' gradients apart."
        )
    series, rows, apart = [], [], []
    for key in pairs:
        name = spoken(key.removeprefix("cosine/").replace("|", " · "))
        steps, values = run.column(key)
        known = values[np.isfinite(values)]
        series.append(charts.Series(name, steps, values, smooth=True))
        share = float((known < 0).mean())
        rows.append([name, f"{known.mean():+.3f}", f"{known.min():+.3f}", f"{share:.1%}", _bar(share)])
        apart.append(dict(zip(steps[np.isfinite(values)].tolist(), (known < 0).tolist(), strict=True)))
    plots["cosine"] = charts.lines(
        "Cosine between the tasks' gradients over the steps", series, "step", marks=run.stage_steps()
    )
    steps_seen = set().union(*apart)
    any_apart = sum(any(pair.get(step, False) for pair in apart) for step in steps_seen) / len(steps_seen)
    method = str((run.recipe.get("surgery") or {}).get("method", "none"))
    text = (
        f"In {any_apart:.1%} of the {len(steps_seen):,} logged steps at least one pair of tasks pulled the shared "
        "encoder in opposing directions (a negative inner product of their gradients). "
    )
    text += (
        "No surgery was applied: the gradients were added as they are."
        if method == "none"
        else f"Surgery ({method}) is what kept one task's step from undoing another's there."
    )
    head = ["tasks", "mean cosine", "lowest", "steps in conflict", ""]
    figures = [figure("Cosine between task gradients", plots["cosine"])]
    steps, shares = run.column("conflicts")
    if np.isfinite(shares).any():
        one = charts.Series("conflicts", steps, shares, smooth=True)
        title = "Share of task pairs in conflict"
        plots["conflicts"] = charts.lines(f"{title} over the steps", [one], "step", (0.0, 1.0), run.stage_steps())
        figures.append(figure(title, plots["conflicts"]))
    return paragraph(text) + gallery(figures) + table("Conflicts by pair of tasks", head, rows)


def _confusions(run: Run, plots: dict[str, str]) -> str:
    parts = []
    for name, task in _tasks(run).items():
        counts, classes = task.get("confusion"), task.get("classes")
        if not counts or not classes:
            continue
        raw = np.array(counts)
        shares = normalised_confusion(raw)
        plots[f"confusion-{name}"] = charts.matrix(
            f"Confusion matrix of {spoken(name)}, counts", raw, classes, lambda v: f"{v:,.0f}"
        )
        plots[f"confusion-{name}-normalised"] = charts.matrix(
            f"Confusion matrix of {spoken(name)}, shares of the truth", shares, classes, lambda v: f"{v:.2f}"
        )
        parts.append(f"<h3>{escape(titled(name))}</h3>")
        tables = [
            figure("Examples", _matrix(f"{name}: counts", raw, shares, classes, "{:,.0f}")),
            figure("Shares of each true class", _matrix(f"{name}: shares", shares, shares, classes, "{:.2f}")),
        ]
        parts.append(gallery(tables))
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
    return scroll(label, f'<table class="matrix">{body}</table>')


def _similarity(run: Run, plots: dict[str, str]) -> str:
    parts = []
    for name, task in _tasks(run).items():
        if task.get("classes") or not task.get("labels"):
            continue
        truth, predicted = (
            np.array([np.nan if v is None else v for v in task[k]], float) for k in ("labels", "predictions")
        )
        order = np.argsort(truth, kind="stable")
        plots[name] = charts.cloud(
            f"Predicted against true {spoken(name)}", truth[order], predicted[order], "truth", "predicted", (0.0, 5.0)
        )
        rows = []
        for low in range(5):
            chosen = (truth >= low) & ((truth < low + 1) | (low == 4))
            if chosen.any():
                inside = predicted[chosen]
                rows.append([f"{low} to {low + 1}", f"{chosen.sum():,}", f"{inside.mean():.2f}", f"{inside.std():.2f}"])
        numbers = table(f"{name} in numbers", ["true label", "pairs", "mean predicted", "spread"], rows)
        parts.append(
            gallery([figure(f"Predicted against true {spoken(name)}", plots[name]), figure("By true label", numbers)])
        )
    return "".join(parts)


def _errors(run: Run) -> str:
    parts = []
    for name, task in _tasks(run).items():
        worst = task.get("worst")
        if not worst:
            continue
        items = [_error(one, task.get("classes")) for one in worst]
        parts.append(f"<h3>{escape(titled(name))}</h3>{_list(items[:SHOWN_ERRORS])}")
        if len(items) > SHOWN_ERRORS:
            parts.append(fold(f"{len(items) - SHOWN_ERRORS} more", _list(items[SHOWN_ERRORS:])))
    if not parts:
        return paragraph("No errors are listed: predictions/details.json has none.")
    return paragraph(
        "Dev examples on which the best model was most wrong, its surest mistakes first.", "muted"
    ) + "".join(parts)


def _error(one: Mapping[str, Any], classes: list[str] | None) -> str:
    def named(value: Any) -> str:
        return classes[int(value)] if classes and value is not None else f"{value:.1f}" if value is not None else "-"

    sure = f" ({one['probability']:.0%} sure)" if _is_number(one, "probability") else ""
    quotes = "".join(f"<q>{escape(str(sentence))}</q>" for sentence in one.get("sentences", ()))
    predicted, truth = escape(named(one.get("prediction"))), escape(named(one.get("label")))
    name = f'<span class="muted">{escape(str(one.get("id", "")))}</span>'
    return f"<li><b>{predicted}</b>{sure}, in truth <b>{truth}</b> {name}{quotes}</li>"


def _list(items: list[str]) -> str:
    return f'<ul class="errors">{"".join(items)}</ul>'


def _time(run: Run) -> str:
    timings = {
        k: float(v) for k, v in (run.summary.get("timings") or {}).items() if _is_number(run.summary["timings"], k)
    }
    total = run.summary.get("seconds")
    if isinstance(total, int | float) and total > sum(timings.values()):
        timings["other"] = timings.get("other", 0.0) + total - sum(timings.values())
    if not timings or sum(timings.values()) <= 0:
        return paragraph("The run recorded no times.")
    whole = sum(timings.values())
    names = {"steps": "rest of the steps"} if "forward" in timings else {}
    rows = [
        [spoken(names.get(name, name)), duration(seconds), f"{seconds / whole:.1%}", _bar(seconds / whole)]
        for name, seconds in sorted(timings.items(), key=lambda item: -item[1])
    ]
    parts = [table("Time by part", ["part", "time", "share", ""], rows)]
    _, seconds = run.column("step_seconds")
    known = seconds[np.isfinite(seconds)]
    tokens = run.summary.get("tokens")
    if len(known):
        text = f"A step took {1000 * float(np.median(known)):,.1f} ms in the median of the logged ones"
        training = sum(timings.get(k, 0.0) for k in TRAINING)
        if isinstance(tokens, int) and training > 0:
            text += f"; {tokens / training:,.0f} tokens a second while training"
        parts.append(paragraph(text + "."))
    return "".join(parts)


def _environment(run: Run) -> str:
    parts = []
    command = run.summary.get("command")
    if command:
        parts += ["<h3>To reproduce</h3>", f"<pre>{escape(str(command))}</pre>"]
    keys = ("device", "precision", "backend", "commit", "seed", "tokens")
    facts = [[key, str(run.summary[key])] for key in keys if run.summary.get(key) is not None]
    facts += [[name, str(version)] for name, version in (run.summary.get("versions") or {}).items()]
    facts += [[key, str(value)] for key, value in flat(run.summary.get("environment") or {}).items()]
    parts.append(table("Environment", ["what", "value"], facts, text_columns=2) if facts else "")
    settings = [[key, str(value)] for key, value in flat(run.recipe).items() if value != ""]
    if settings:
        parts.append(fold("All settings", table("Settings", ["setting", "value"], settings, text_columns=2)))
    return "".join(parts)


# ---- Small helpers -------------------------------------------------------------------------------------------------


def _tasks(run: Run) -> dict[str, dict[str, Any]]:
    tasks = run.details.get("tasks")
    return tasks if isinstance(tasks, dict) else {}


def _primary(run: Run) -> set[str]:
    """Metrics worth a line in the chart of dev scores: one a task, and the score."""
    names = {key.removeprefix("dev/") for key in run.keys("dev/")}
    return {n for n in names if n == "score" or n.endswith(("_accuracy", "_pearson"))}


def _bar(share: float) -> str:
    return Html(f'<span class="bar" style="--share: {min(max(share, 0.0), 1.0):.3f}"></span>')


def _is_number(values: Any, key: str) -> bool:
    value = values.get(key) if isinstance(values, Mapping) else None
    return isinstance(value, int | float) and not isinstance(value, bool)
