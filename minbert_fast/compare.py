# SPDX-License-Identifier: Apache-2.0
"""Compares multitask methods: the same recipe under every method with several seeds, in one table.

    python -m minbert_fast.compare --methods none,pcgrad,cagrad --seeds 3 --data DIR --model DIR --output DIR
    ... --methods none,dwa,pcgrad+uncertainty,'torchjd:CAGrad(c=0.4)'    weights of losses, both, a method of TorchJD

A method is one of surgery (none, pcgrad, ..., torchjd:NAME), one of loss weights (uncertainty, dwa, famo, random), or one of
each with a plus sign. Each run has a directory under --output; a second call resumes the interrupted run and skips finished
ones. Results: table.md, table.csv, table.tex, table.json and comparison.html.

The change against summed losses is the mean over the tasks of (M - M0) / M0, with a minus sign where lower is better. M is
a task's dev metric, and M0 the same with summed losses and the same seed: Delta-m of Maninis, Radosavovic & Kokkinos 2019
(arXiv:1904.08918), whose reference is one model per task. p is of a paired t test of these changes against 0 over the
seeds, adjusted for the number of methods (Holm 1979).
"""

from __future__ import annotations

import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast import surgery
from minbert_fast.common import cli
from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.statistics import holm, paired_t_test
from minbert_fast.common.storage import csv_lines, write_json, write_text
from minbert_fast.recipes.recipe import Recipe, parse_assignments
from minbert_fast.reporting import charts
from minbert_fast.reporting.markdown import aligned_table
from minbert_fast.reporting.page import document, figure, format_duration, paragraph, table
from minbert_fast.reporting.runs import TRAINING_PARTS, read_run
from minbert_fast.step.extras.weighting import METHODS as WEIGHTINGS
from minbert_fast.tasks.metrics import lower_is_better
from minbert_fast.trainer import experiments
from minbert_fast.trainer.experiments import Trial
from minbert_fast.trainer.job import BACKENDS
from minbert_fast.trainer.outputs import lock_directory
from minbert_fast.trainer.table_reader import names_data

NONE = "none"  # summed losses, the baseline of the comparison
FORMULA = (
    "Change: mean over the tasks of (M - M0) / M0, M0 with summed losses and the same seed (Delta-m, Maninis et al. 2019, "
    "arXiv:1904.08918). p: paired t test of the changes over the seeds, adjusted for the number of methods (Holm 1979)."
)


def parser() -> cli.Parser:
    command = cli.Parser("compare", __doc__ or "")
    add = command.add_argument
    add("--methods", metavar="A,B,...", required=True, help="methods; none (summed losses) is added if it is missing")
    add("--seeds", metavar="N", type=cli.positive_number, default=3, help="runs of each method (default: 3)")
    add("--recipe", metavar="NAME|FILE.toml", help="(default: default; without --model: demonstration)")
    add("--backend", choices=BACKENDS, default="auto")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help="as in train (repeatable)")
    experiments.add_series_flags(command)
    return command


def main(arguments: Sequence[str]) -> None:
    """Runs every method with every seed and updates the results after each run. Raises ConfigError or RunError."""
    chosen = parser().parse_args(arguments)
    base = experiments.load_recipe(chosen.recipe, chosen)
    base = base.with_values(parse_assignments(chosen.assignments), "command line")
    methods = split_methods(chosen.methods)
    recipes = {method: with_method(base, method) for method in methods}  # finds mistakes before the first run
    seeds = [base.training.seed + i for i in range(chosen.seeds)]
    output: Path = chosen.output
    planned = {
        (method, seed): (
            recipe.with_values({"training": {"seed": seed}}, "--seeds"),
            output / directory_name(method) / f"seed-{seed}",
        )
        for seed in seeds  # every method before the next seed: an interrupted comparison has rows to compare
        for method, recipe in recipes.items()
    }
    for recipe, where in planned.values():  # finds runs of something else, likewise
        experiments.check_trial(where, recipe, chosen.backend)
    command = shlex.join(["python", "-m", "minbert_fast.compare", *arguments])
    trials: dict[tuple[str, int], Trial] = {}
    with lock_directory(output):
        for (method, seed), (recipe, where) in planned.items():
            name = f"{method}, seed {seed}"
            print(f"\n== {len(trials) + 1} of {len(planned)}: {name}", flush=True)
            trials[method, seed] = experiments.run_or_resume(
                name, recipe, where, command, chosen.device, chosen.backend
            )
            write_results(output, compare(base, methods, trials) | {"command": command})
    print("\n" + (output / "table.md").read_text(encoding="utf-8"), end="")
    failed = [trial.name for trial in trials.values() if trial.failure]
    if failed:
        raise RunError(f"{len(failed)} of {len(trials)} runs failed: {'; '.join(failed)}")


# ---- Methods ------------------------------------------------------------------------------------------------------------


def split_methods(text: str) -> list[str]:
    """The names in --methods, without repetitions, `none` first. Commas in brackets belong to a name."""
    names = [name.strip() for name in re.split(r",(?![^(\[]*[)\]])", text)]
    if "" in names:
        raise ConfigError(f"--methods {text!r}: expected names separated by commas")
    return list(dict.fromkeys([NONE, *names]))


def with_method(base: Recipe, method: str) -> Recipe:
    """The recipe with the method's surgery and loss weights. Raises ConfigError for an unknown method."""
    values = {"surgery": {"method": NONE}, "weighting": {"method": NONE}}
    named: list[str] = []
    for part in re.split(r"\+(?![^(]*\))", method):
        section = "weighting" if part in WEIGHTINGS else "surgery"
        if section == "surgery":
            try:
                surgery.weights(part, base.surgery.reduction)
            except ValueError as error:
                also = f"or of {', '.join(WEIGHTINGS)} (weights of the losses)"
                raise ConfigError(f"--methods: {error}; {also}") from None
        named.append(section)
        values[section] = {"method": part}
    if len(named) != len(set(named)):
        raise ConfigError(f"--methods: {method!r}: expected at most one method of surgery and one of loss weights")
    for index, stage in enumerate(base.stages):
        for section in values.keys() & stage.keys():
            where = f"recipe {base.name}: stages[{index}]"
            raise ConfigError(f"{where} sets {section}, which --methods chooses: leave it out")
    return base.with_values(values, "--methods")


def directory_name(method: str) -> str:
    """The name of a method's directory."""
    return "".join(c if c.isalnum() or c in "-_+=.,()" else "_" for c in method)


# ---- Numbers ------------------------------------------------------------------------------------------------------------


def compare(base: Recipe, methods: Sequence[str], trials: Mapping[tuple[str, int], Trial]) -> dict[str, Any]:
    """The content of table.json: every run's numbers, and each method's means, changes and p-values."""
    primary = experiments.primary_metrics(trials.values(), base)
    runs = [_run(method, seed, trial) for (method, seed), trial in trials.items()]
    found = {(run["method"], run["seed"]): run["dev"] for run in runs if run["dev"]}
    metrics = [m for m in (*primary, "score") if any(dev.get(m) is not None for dev in found.values())]
    tested = [m for m in metrics if m in primary]
    rows = []
    for method in methods:
        own = [run for run in runs if run["method"] == method and run["dev"]]
        pairs = [(run["dev"], found[NONE, run["seed"]]) for run in own if (NONE, run["seed"]) in found]
        changes = [] if method == NONE else [c for pair in pairs if (c := _change(*pair, tested)) is not None]
        row: dict[str, Any] = {"method": method, "runs": len(own)}
        row["failure"] = next((t.failure for (m, _), t in trials.items() if m == method and t.failure), "")
        row["dev"] = {metric: _spread([run["dev"].get(metric) for run in own]) for metric in metrics}
        row["change"] = _spread(changes)
        row["p"] = paired_t_test(changes)
        row["conflicts"] = _spread([run["conflicts"] for run in own])
        row["step_seconds"] = statistics.median(run["step_seconds"] for run in own) if own else None
        rows.append(row)
    known = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(known, holm([row["p"] for row in known]), strict=True):
        row["p_adjusted"] = adjusted
    facts = ("device", "precision", "backend", "commit", "steps", "versions")
    about = {key: next((t.summary[key] for t in trials.values() if t.summary.get(key)), None) for key in facts}
    seeds = list(dict.fromkeys(seed for _, seed in trials))
    data = Path(base.data.directory).name or ("the recipe's own data" if names_data(base) else "")
    setting = {"recipe": base.name, "model": Path(base.model.name).name, "data": data}
    return {**setting, **about, "seeds": seeds, "metrics": metrics, "rows": rows, "runs": runs}


def _run(method: str, seed: int, trial: Trial) -> dict[str, Any]:
    summary = trial.summary
    seconds = sum(value for part, value in summary.get("timings", {}).items() if part in TRAINING_PARTS)
    conflicts = read_run(trial.directory).finite("conflicts") if summary else np.array([])
    return {
        "method": method,
        "seed": seed,
        "dev": dict(summary.get("dev", {})),
        "conflicts": float(conflicts.mean()) if len(conflicts) else None,
        "step_seconds": seconds / max(summary.get("steps", 0), 1),
        "seconds": summary.get("seconds"),
        "directory": f"{trial.directory.parent.name}/{trial.directory.name}",
    }


Scores = Mapping[str, float | None]


def _change(dev: Scores, reference: Scores, metrics: Iterable[str]) -> float | None:
    """Delta-m, as a fraction: above 0 is better. None if a metric is missing, or 0 with summed losses."""
    shares = []
    for metric in metrics:
        now, then = dev.get(metric), reference.get(metric)
        if now is None or not then:
            return None
        shares.append((then - now if lower_is_better(metric) else now - then) / abs(then))
    return statistics.fmean(shares) if shares else None


def _spread(values: Iterable[float | None]) -> dict[str, float | None] | None:
    """Mean and standard deviation (n - 1 in the denominator); None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


# ---- Tables -------------------------------------------------------------------------------------------------------------


def cells(result: Mapping[str, Any], plus_minus: str = " ± ") -> tuple[list[str], list[list[str]]]:
    """The table's head and rows as text; empty cells are unknown, and a column that is empty throughout is left out."""
    metrics = result["metrics"]
    head = ["method", *(m.replace("_", " ") for m in metrics), "change, %", "p", "conflicts, %", "ms a step", "x none"]
    reference = next((row["step_seconds"] for row in result["rows"] if row["method"] == NONE), None)
    rows = []
    for row in result["rows"]:
        seconds = row["step_seconds"]
        adjusted = row.get("p_adjusted")
        rows.append([
            row["method"],
            *(_text(row["dev"][metric], 1, 3, plus_minus) for metric in metrics),
            _text(row["change"], 100, 2, plus_minus, sign=True),
            "" if adjusted is None else f"{adjusted:.3f}",
            "" if row["conflicts"] is None else f"{100 * row['conflicts']['mean']:.0f}",
            "" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}",
            "" if seconds is None or not reference else f"{seconds / reference:.2f}",
        ])  # fmt: skip
    filled = [index for index in range(len(head)) if any(row[index] for row in rows)]
    return [head[index] for index in filled], [[row[index] for index in filled] for row in rows]


def _text(value: Mapping[str, Any] | None, scale: float, digits: int, plus_minus: str, sign: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{scale * value['mean']:{'+' if sign else ''}.{digits}f}"
    return mean if value["sd"] is None else f"{mean}{plus_minus}{scale * value['sd']:.{digits}f}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """The paragraphs below the table."""
    steps, torch_version, commit = result["steps"], (result["versions"] or {}).get("torch"), result["commit"]
    facts = [
        result["data"] or "the embedded sample",
        "" if steps is None else f"{steps} steps",
        *(result[key] for key in ("device", "precision", "backend")),
        torch_version and f"torch {torch_version}",
        commit and f"commit {commit[:12]}",
    ]
    timed = any(row["step_seconds"] is not None for row in result["rows"])
    times = "ms a step: median over the seeds, one run after the other. " if timed else ""
    lines = [
        f"Dev scores of each run's best model, mean ± standard deviation over seeds "
        f"{', '.join(map(str, result['seeds']))}. {FORMULA}",
        f"Conflicts: share of task pairs whose gradients oppose each other. {times}"
        f"Recipe {result['recipe']}, {result['model'] or 'the embedded tiny model'} on "
        f"{', '.join(filter(None, facts))}.",
    ]
    return lines + [f"{row['method']}: {row['failure']}" for row in result["rows"] if row["failure"]]


def markdown(result: Mapping[str, Any]) -> str:
    """The table and its notes in Markdown."""
    return aligned_table(*cells(result)) + "".join(f"\n{line}\n" for line in notes(result))


def latex(result: Mapping[str, Any]) -> str:
    """The table as a LaTeX tabular for the package booktabs; a column's best scores are bold."""
    head, rows = cells(result, r" \pm ")
    best = {}
    for column, metric in enumerate(result["metrics"], start=1):
        sign = -1 if lower_is_better(metric) else 1
        means = [sign * row["dev"][metric]["mean"] if row["dev"][metric] else -np.inf for row in result["rows"]]
        shown = np.round(means, 3)
        best[column] = np.flatnonzero(shown == shown.max())

    def cell(text: str, row: int, column: int) -> str:
        if column == 0 or not text:
            return _escaped(text)
        return rf"$\mathbf{{{text}}}$" if row in best.get(column, ()) else f"${text}$"

    lines = [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_escaped, head)) + r" \\", r"\midrule"]
    lines += [" & ".join(cell(text, i, j) for j, text in enumerate(row)) + r" \\" for i, row in enumerate(rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {line}" for line in notes(result))]) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"([_%&#$])", r"\\\1", text)


def comma_separated(result: Mapping[str, Any]) -> str:
    """One line a method with plain numbers: means, standard deviations, p-values."""
    columns = ["method", "runs"]
    columns += [f"{m}{end}" for m in (*result["metrics"], "change", "conflicts") for end in ("", "_sd")]
    rows = [[*columns, "p", "p_adjusted", "step_seconds"]]
    for row in result["rows"]:
        spreads = [*(row["dev"][m] for m in result["metrics"]), row["change"], row["conflicts"]]
        numbers = [(s or {}).get(key) for s in spreads for key in ("mean", "sd")]
        tail = [row["p"], row.get("p_adjusted"), row["step_seconds"]]
        rows.append([row["method"], row["runs"], *("" if n is None else f"{n:.6g}" for n in (*numbers, *tail))])
    return csv_lines(rows)


def page(result: Mapping[str, Any], output: Path) -> str:
    """The table, and the dev score over the steps, as one self-contained page."""
    head, rows = cells(result)
    body = "<h1>Multitask methods compared</h1>" + paragraph(f"{len(result['runs'])} runs", "muted")
    scores = table("Scores", head, rows) + "".join(map(paragraph, notes(result)))
    spent = sum(run["seconds"] or 0 for run in result["runs"])
    sections = [("Scores", scores), ("Dev score over the steps", curves(result, output))]
    sections.append(("To reproduce", f"<pre>{escape(result['command'])}</pre>"
                     + paragraph(f"All runs took {format_duration(spent)}.")))  # fmt: skip
    return document("Multitask methods compared", sections, body)


def curves(result: Mapping[str, Any], output: Path) -> str:
    """One line a method: its mean dev score over the seeds. Empty if the runs were evaluated once only."""
    series = []
    for row in result["rows"]:
        found = [run for run in result["runs"] if run["method"] == row["method"] and run["dev"]]
        columns = [read_run(output / run["directory"]).column("dev/score") for run in found]
        shortest = min((len(steps) for steps, _ in columns), default=0)
        if shortest > 1:
            mean = np.mean([values[:shortest] for _, values in columns], axis=0)
            series.append(charts.Series(row["method"], columns[0][0][:shortest], mean))
    return figure("mean dev score", charts.line_chart("mean dev score", series, "step")) if series else ""


def write_results(output: Path, result: Mapping[str, Any]) -> None:
    """Writes table.md, .csv, .tex, .json and comparison.html."""
    write_json(output / "table.json", result)
    write_text(output / "table.md", markdown(result))
    write_text(output / "table.csv", comma_separated(result))
    write_text(output / "table.tex", latex(result))
    write_text(output / "comparison.html", page(result, output))


if __name__ == "__main__":
    sys.exit(cli.run(main))
