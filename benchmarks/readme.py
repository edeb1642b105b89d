# SPDX-License-Identifier: Apache-2.0
"""Writes the README's tables from the files under benchmarks/results, so that no figure is typed.

python -m benchmarks.readme            rewrites README.md between its `<!-- table NAME -->` marks
python -m benchmarks.readme --check    exit status 1 if that would change anything
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def first_run(results: Path = RESULTS) -> str:
    """Dev scores before and after one epoch, from a run's `summary.json`."""
    run: dict[str, Any] = json.loads((results / "first-run-cpu.json").read_text(encoding="utf-8"))
    names = {
        "sentiment_accuracy": "sentiment, accuracy",
        "paraphrase_accuracy": "paraphrase, accuracy",
        "similarity_pearson": "similarity, Pearson",
        "score": "score",
    }
    lines = ["| dev | untrained | after one epoch |", "|---|---|---|"]
    lines += [f"| {label} | {run['untrained'][key]:.3f} | {run['dev'][key]:.3f} |" for key, label in names.items()]
    lines += ["", f"{run['steps']} steps, {run['tokens']:,} tokens, PCGrad, {run['precision']} products on a CPU."]
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"first run": first_run}


def filled(text: str) -> str:
    """`text` with each table between its marks written anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table ([\w ]+?) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrites or checks README.md; returns the exit status."""
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv[1:]:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
