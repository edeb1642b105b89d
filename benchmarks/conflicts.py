# SPDX-License-Identifier: Apache-2.0
"""Saves a training run's gradient cosines for the table and the figure in docs/surgery.md.

python -m minbert_fast.train --data DIR --model DIR --output runs/conflicts --epochs 1 --set logging.every=1
python -m benchmarks.conflicts runs/conflicts MiniLM-L6     writes benchmarks/results/conflicts.json
python -m benchmarks.readme                                 writes the table and the figure
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.reporting import charts, markdown
from minbert_fast.reporting.runs import Run, read_run

RESULTS = Path(__file__).parent / "results" / "conflicts.json"
PREFIX = "cosine/"


def extract(run: Run, model: str) -> dict[str, Any]:
    """A run's cosines by pair of tasks (null at steps where a task had no gradient) and the facts of the run.

    `model` is the name of the initial weights. Raises SystemExit if the run logged no cosines.
    """
    pairs = {key.removeprefix(PREFIX): run.column(key) for key in run.keys(PREFIX)}
    if not pairs:
        raise SystemExit(f"{run.directory}: no cosines were logged; train with surgery on two tasks or more")
    facts = ("recipe", "precision", "device", "steps", "tokens", "commit", "versions")
    return {key: run.summary.get(key) for key in facts} | {
        "model": model,
        "method": run.recipe.get("surgery", {}).get("method"),
        "cosines": {
            pair: {
                "step": [int(s) for s in steps],
                "value": [None if np.isnan(v) else round(float(v), 4) for v in values],
            }
            for pair, (steps, values) in pairs.items()
        },
    }


def series(result: Mapping[str, Any]) -> list[charts.Series]:
    """One line per pair of tasks."""
    return [
        charts.Series(
            pair.replace("|", " · "),
            np.array(found["step"], dtype=float),
            np.array([np.nan if v is None else v for v in found["value"]], dtype=float),
            smooth=True,
        )
        for pair, found in result["cosines"].items()
    ]


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table of the cosines, and the share of steps in which any pair was in conflict."""
    found, rows = series(result), []
    for one in found:
        known = one.y[np.isfinite(one.y)]
        signed = [f"{value:+.3f}" for value in (known.mean(), known.min())]
        rows.append((one.name, signed[0], f"{np.abs(known).mean():.3f}", signed[1], f"{(known < 0).mean():.0%}"))
    conflicting = set().union(*(one.x[one.y < 0].tolist() for one in found))
    logged = set().union(*(one.x.tolist() for one in found))
    torch = (result["versions"] or {}).get("torch")
    lines = [
        *markdown.table(("tasks", "mean cosine", "mean size", "lowest", "steps in conflict"), rows),
        "",
        f"Some pair was in conflict in {len(conflicting) / len(logged):.0%} of the steps. Recipe `{result['recipe']}`, "
        f"{result['model']}, {result['method']}, {result['steps']} steps, {result['precision']} products on a "
        f"{result['device']}, torch {torch}, commit {str(result['commit'])[:7]}.",
    ]
    return "\n".join(lines)


def figure(result: Mapping[str, Any]) -> str:
    """The SVG text of the cosines over the steps."""
    label = "Cosine between the tasks' gradients over the steps"
    return charts.standalone_svg(charts.line_chart(label, series(result), "step"))


def main(arguments: Sequence[str]) -> int:
    """Writes the results file of one run."""
    if len(arguments) != 2:
        raise SystemExit("python -m benchmarks.conflicts RUN MODEL")
    RESULTS.write_text(json.dumps(extract(read_run(Path(arguments[0])), arguments[1])) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
