# SPDX-License-Identifier: Apache-2.0
"""Keeps what a training run measured of its tasks' conflicts, for docs/surgery.md.

python -m minbert_fast.train --data DIR --model DIR --output runs/conflicts --epochs 1 --set logging.every=1
python -m benchmarks.conflicts runs/conflicts          writes benchmarks/results/conflicts.json
python -m benchmarks.readme                            the table and the figure
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.training import charts
from minbert_fast.training.runs import Run, read_run

RESULTS = Path(__file__).parent / "results" / "conflicts.json"
PREFIX = "cosine/"


def measured(run: Run) -> dict[str, Any]:
    """A run's cosines by pair of tasks, a value a logged step (null where a task had no gradient), and what they are of."""
    pairs = {key.removeprefix(PREFIX): run.column(key) for key in run.keys(PREFIX)}
    if not pairs:
        raise SystemExit(f"{run.directory}: no cosines were logged; train with surgery on two tasks or more")
    facts = ("recipe", "precision", "device", "steps", "tokens", "commit", "versions")
    return {key: run.summary.get(key) for key in facts} | {
        "model": Path(str(run.recipe.get("model", {}).get("name", ""))).name,
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
    """A line a pair of tasks."""
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
    """Markdown: how far each pair of tasks pulled apart, at the beginning and at the end."""
    lines = [
        "| tasks | mean cosine | first tenth | last tenth | lowest | steps in conflict |",
        "|---|---|---|---|---|---|",
    ]
    for one in series(result):
        known = one.y[np.isfinite(one.y)]
        tenth = max(1, len(known) // 10)
        numbers = (known.mean(), known[:tenth].mean(), known[-tenth:].mean(), known.min())
        cells = " | ".join(f"{number:+.3f}" for number in numbers)
        lines.append(f"| {one.name} | {cells} | {(known < 0).mean():.0%} |")
    torch = (result["versions"] or {}).get("torch")
    lines += [
        "",
        f"Recipe `{result['recipe']}`, {result['model']}, {result['method']}, {result['steps']} steps, "
        f"{result['precision']} products on a {result['device']}, torch {torch}, commit {result['commit']}.",
    ]
    return "\n".join(lines)


def figure(result: Mapping[str, Any]) -> str:
    """The cosines over the steps, as an SVG file's text."""
    return charts.standalone(charts.lines("Cosine between the tasks' gradients over the steps", series(result), "step"))


def main(arguments: Sequence[str]) -> int:
    """Writes the results file of one run."""
    if len(arguments) != 1:
        raise SystemExit("python -m benchmarks.conflicts RUN")
    RESULTS.write_text(json.dumps(measured(read_run(Path(arguments[0]))), indent=None) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
