# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and figures of README and docs from the files under benchmarks/results, so that no number is typed.

python -m benchmarks.readme            rewrites pages between their `<!-- table NAME -->` marks, and docs/figures
python -m benchmarks.readme --check    exit status 1 if that would change the tables

A suite's results are the file DEVICE-SUITE.json that `python -m benchmarks.run SUITE --json` wrote; without one its
table says how to make it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ablation, conflicts, figures
from minbert_fast.recipes.recipe import Recipe, recipe_names

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "surgery.md")
DEVICES = ("cpu", "cuda")

Table = Callable[[Sequence[Mapping[str, Any]]], list[str]]  # a suite's rows, in the lines of a page


def dev_scores(results: Path = RESULTS) -> str:
    """Dev scores on real data: untrained, after an epoch of `default`, and of `best`; beside them the best published."""
    first, best = (
        json.loads((results / f"{run}-cpu.json").read_text(encoding="utf-8")) for run in ("first-run", "best")
    )
    recipes = [Recipe.load(name) for name in recipe_names()]
    rival = max(recipes, key=lambda recipe: recipe.published.get("score", 0.0))
    names = {
        "sentiment_accuracy": "sentiment, accuracy",
        "paraphrase_accuracy": "paraphrase, accuracy",
        "similarity_pearson": "similarity, Pearson",
        "score": "score",
    }
    runs = [f"`{run['recipe']}`, {run['steps']:,} steps" for run in (first, best)]
    lines = [
        f"| dev | untrained | {runs[0]} | {runs[1]} | `{rival.name}`, as published, BERT-base |",
        "|---|---|---|---|---|",
    ]
    for key, label in names.items():
        scores = (first["untrained"][key], first["dev"][key], best["dev"][key], rival.published[key])
        lines.append(f"| {label} | {' | '.join(f'{score:.3f}' for score in scores)} |")
    precision = f"{best['precision']} products on a CPU"
    lines += ["", f"{first['tokens']:,} and {best['tokens']:,} tokens, {precision}, commit {best['commit'][:12]}."]
    return "\n".join(lines)


def ablated(results: Path = RESULTS) -> str:
    """What the choices of recipe `best` are worth."""
    return ablation.table(json.loads((results / "ablation.json").read_text(encoding="utf-8"))["runs"]).rstrip()


def suite(name: str, device: str, results: Path = RESULTS, table: Table | None = None) -> str:
    """A suite's table on a device, and where and when it was measured."""
    path = results / f"{device}-{name}.json"
    if not path.exists():
        command = f"python -m benchmarks.run {name} --device {device} --json benchmarks/results/{path.name}"
        return f"Not measured yet: `{command}`."
    result = json.loads(path.read_text(encoding="utf-8"))
    ceilings = result["ceilings"]
    lines = [
        *(table or SUITES[name])(result["rows"]),
        "",
        f"{result['device']}, {result['threads']} threads, load {result['load'][0]}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}, {result['date'][:10]}. Measured there: a copy {ceilings['copy_GB_per_s']:.0f} GB/s, "
        f"products {ceilings['fp32_TFLOP_per_s']:.3g} TFLOP/s in fp32 and {ceilings['bf16_TFLOP_per_s']:.3g} in bf16.",
    ]
    return "\n".join(lines)


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    costs = [f"{row['note']} ({row['case'].split(',')[0]})" for row in rows if row["name"] == "share"]
    fits = [row["note"] for row in rows if row["case"].endswith("scaling")]
    lines = ways(rows, "pcgrad")
    if costs:
        lines.append(f"\nOur step with PCGrad, measured in turn with itself without: {', '.join(costs)}.")
    return lines + [f"\nOver tokens and 1 to 16 tasks (MiniLM-L6 shape): {note}." for note in fits]


def ways(rows: Sequence[Mapping[str, Any]], method: str) -> list[str]:
    """Every way to take a step under a method of surgery, slowest first."""
    wanted = [row for row in rows if row["median"] and row["case"].endswith(f"3 x 32 examples, {method}")]
    lines = [
        "| shape | step | ms | real tokens/s | times naive | times transformers | of products alone | working memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in _in_order(wanted):
        found = [row for row in wanted if row["case"] == case]
        for row in sorted(found, key=lambda row: -row["median"]):
            naive, rival = (
                "1" if row["name"] == other else f"{row['speedup'][other]:.1f}" if other in row["speedup"] else ""
                for other in ("naive", "transformers")
            )
            lines.append(
                f"| {case.split(',')[0]} | {row['name']} | {_milliseconds(row['median'])} | {row['tokens_per_second']:,.0f} "
                f"| {naive} | {rival} | {row['of_product']:.0%} | {row['working_megabytes']:,.0f} MB |"
            )
    return lines


def _surgeries(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| J | op | way | ms | of a copy | ours is faster by |", "|---|---|---|---|---|---|"]
    wanted = [row for row in rows if row["median"] and "T=3, float32, random" in row["case"]]
    for case in _in_order(wanted):
        found = [row for row in wanted if row["case"] == case]
        (ours,) = (row for row in found if row["name"] == "ours")
        size, op = case.split(", random: ")
        for row in found:
            times = ours["speedup"].get(row["name"])
            share = "" if row["of_copy"] is None else f"{row['of_copy']:.0%}"
            faster = f"{times:.1f}" if times else ""
            lines.append(f"| {size} | {op} | {row['name']} | {_milliseconds(row['median'])} | {share} | {faster} |")
    return lines


def _encodes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| sentences | way | ms | faster than sentence-transformers |", "|---|---|---|---|"]
    for row in rows:
        if row["median"]:
            times = ", ".join(f"{x:.1f} ({name.split()[1].rstrip(',')})" for name, x in row["speedup"].items())
            mine = row["name"].startswith("ours")
            lines.append(
                f"| {row['case']} | {row['name']} | {_milliseconds(row['median'])} | {times if mine else ''} |"
            )
    return lines


def measured_conflicts(results: Path = RESULTS) -> str:
    """How far the tasks' gradients pulled apart in a real run."""
    return conflicts.table(json.loads((results / "conflicts.json").read_text(encoding="utf-8")))


def _in_order(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


SUITES: Mapping[str, Table] = {"step": _steps, "surgery": _surgeries, "encode": _encodes}
TABLES: Mapping[str, Callable[[], str]] = (
    {"dev scores": dev_scores, "ablation": ablated, "conflicts": measured_conflicts}
    | {f"{name} {device}": partial(suite, name, device) for name in SUITES for device in DEVICES}
    | {f"summed {device}": partial(suite, "step", device, table=partial(ways, method="none")) for device in DEVICES}
)


def draw(results: Path = RESULTS, folder: Path = FIGURES) -> None:
    """The step suite's figures, of each device whose results are there, and the measured conflicts."""
    if (results / "conflicts.json").exists():
        found = json.loads((results / "conflicts.json").read_text(encoding="utf-8"))
        (folder / "conflicts.svg").write_text(conflicts.figure(found), encoding="utf-8")
    for device in DEVICES:
        path = results / f"{device}-step.json"
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            (folder / f"step-{device}.svg").write_text(figures.speeds(rows), encoding="utf-8")
            if any(row["name"] == "ours, more examples" for row in rows):  # a run cut short has none
                (folder / f"scaling-{device}.svg").write_text(figures.scaling(rows), encoding="utf-8")


def filled(text: str) -> str:
    """`text` with each table between its marks written anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table ([\w ]+?) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrites or checks the pages; returns the exit status."""
    old = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: filled(text) for page, text in old.items()}
    if "--check" in sys.argv[1:]:
        return int(new != old)
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")
    draw()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
