# SPDX-License-Identifier: Apache-2.0
"""Generates the tables and figures of README and docs from the files under benchmarks/results.

python -m benchmarks.readme            rewrites the tables after `<!-- table NAME -->` marks, and docs/figures
python -m benchmarks.readme --check    exit status 1 if that would change the tables

`python -m benchmarks.run SUITE --json` writes a suite's results to DEVICE-SUITE.json. Without that file the table shows
the command that writes it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import ablation, conflicts, figures
from minbert_fast import compare
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.reporting import markdown, published
from minbert_fast.trainer import reproduction

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{page}.md"
        for page in ("exporting", "index", "performance", "recipes", "reliability", "surgery")
    ),
)
DEVICES = ("cpu", "cuda")
METHOD = "3 x 32 examples, pcgrad"  # how the step suite's main cases end
FP32 = ("naive", "ours, fp32", "transformers, fp32")  # every other way to take a step has bf16 products

Table = Callable[[Sequence[Mapping[str, Any]]], list[str]]  # rows of a suite -> lines of a page


def dev_scores(results: Path = RESULTS) -> str:
    """Dev scores on real data: untrained, after recipe `default`, after `best`, and the best published ones."""
    first, best = _load(results / "first-run-cpu.json"), _load(results / "best-cpu.json")
    recipes = [Recipe.load(name) for name in recipe_names()]
    rival = max(recipes, key=lambda recipe: recipe.published.dev.get("score", 0.0))
    names = {
        "sentiment_accuracy": "sentiment, accuracy",
        "paraphrase_accuracy": "paraphrase, accuracy",
        "similarity_pearson": "similarity, Pearson",
        "score": "score",
    }
    runs = [f"`{run['recipe']}`, {run['steps']:,} steps" for run in (first, best)]
    columns = (first["untrained"], first["dev"], best["dev"], rival.published.dev)
    rows = [(label, *(f"{scores[key]:.3f}" for scores in columns)) for key, label in names.items()]
    head = ("dev", "untrained", *runs, f"`{rival.name}`, as published, BERT-base")
    tokens = f"{first['tokens']:,} and {best['tokens']:,} tokens, {best['precision']} products on a CPU"
    place = f"{tokens}, commits {first['commit'][:7]} and {best['commit'][:7]}."
    return "\n".join([*markdown.table(head, rows), "", place])


def published_rows(results: Path = RESULTS) -> str:
    """The reports' rows, then published beside measured scores of those that `reproduce` has run."""
    path = results / "reproduced.json"
    rows = reproduction.read_rows(path)
    parts = [published.published_table()]
    if rows:
        parts.append(published.page(rows))
    missing = [name for name in published.published_names() if name not in rows]
    if missing:
        command = "python -m minbert_fast.reproduce --data DIR --model DIR --output DIR"
        names = ", ".join(missing) if rows else "all of them"
        parts.append(f"Not measured yet: {names} (`{command} --results benchmarks/results/{path.name}`).")
    return "\n".join(parts).rstrip()


def gpu_runs(results: Path = RESULTS) -> str:
    """Duration and dev scores of recipes `default` and `best` on one GPU."""
    runs = [_load(results / f"{run}-cuda.json") for run in ("first-run", "best")]
    keys = ("sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson", "score")
    rows = [
        (
            f"`{run['recipe']}`",
            f"{run['steps']:,}",
            f"{run['tokens']:,}",
            f"{run['seconds']:.1f}",
            f"{run['timings']['steps']:.1f}",
            *(f"{run['dev'][key]:.3f}" for key in keys),
        )
        for run in runs
    ]
    head = (
        "recipe",
        "steps",
        "tokens",
        "seconds, whole run",
        "seconds in steps",
        *(key.partition("_")[0] for key in keys),
    )
    place = f"{runs[-1]['device']}, torch {runs[-1]['versions']['torch']}, {runs[-1]['precision']} products"
    return "\n".join([*markdown.table(head, rows), "", f"{place}, commit {runs[-1]['commit'][:12]}."])


def gpu_tests(results: Path = RESULTS) -> str:
    """Counts of the tests that ran on a GPU, in a sentence."""
    found = _load(results / "cuda-tests.json")
    tests, memcheck = found["tests"], found["memcheck"]
    return (
        f"Commit {found['commit']} on {found['device']}: {tests['passed']} of {tests['of']} GPU tests passed. "
        f"memcheck over the {memcheck['count']} tests of `{memcheck['tests']}` found {memcheck['errors']} errors."
    )


def gpu_profile(results: Path = RESULTS) -> str:
    """Microseconds and launches of one captured step on a GPU, by group of kernels."""
    found = _load(results / "cuda-profile.json")
    shapes = list(dict.fromkeys(row["shape"] for row in found["rows"]))
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in found["rows"]:
        groups.setdefault(row["kernels"], []).append((row["microseconds"], row["launches"]))
    columns = zip(*groups.values(), strict=True)
    groups["all"] = [(sum(time for time, _ in column), sum(count for _, count in column)) for column in columns]
    head = ("kernels", *(f"{shape}: {unit}" for shape in shapes for unit in ("us", "launches")))
    rows = [
        (kernels, *(text for time, count in cells for text in (f"{time:,.0f}", f"{count:.0f}")))
        for kernels, cells in groups.items()
    ]
    return "\n".join(
        [*markdown.table(head, rows), "", f"{found['device']}, commit {found['commit']}; {found['note']}."]
    )


def ablation_table(results: Path = RESULTS) -> str:
    """Held-out scores of each choice in recipe `best`."""
    return ablation.table(_load(results / "ablation.json")["runs"]).rstrip()


def suite(name: str, device: str, results: Path = RESULTS, table: Table | None = None) -> str:
    """A suite's table for a device, then the machine, commit and date of the measurement."""
    path = results / f"{device}-{name}.json"
    if not path.exists():
        command = f"python -m benchmarks.run {name} --device {device} --json benchmarks/results/{path.name}"
        return f"Not measured yet: `{command}`."
    result = _load(path)
    place = _place(result)
    if name == "any_model":  # its ratios refer to no ceiling
        place = place.partition(" Ceilings")[0]
    return "\n".join([*(table or SUITES[name])(result["rows"]), "", place])


def _place(result: Mapping[str, Any]) -> str:
    """One line: device, versions, commit, date and the machine's ceilings. Unrecorded values are left out."""
    ceilings = result["ceilings"]
    parts = [
        result["device"],
        f"{result['threads']} threads" if result["threads"] else "",
        f"load {result['load'][0]}" if result["load"] else "",
        f"torch {result['versions']['torch']}",
        f"commit {result['commit']}",
        result["date"][:10],
    ]
    return (
        f"{', '.join(part for part in parts if part)}. "
        f"Ceilings measured there: a copy {ceilings['copy_GB_per_s']:,.0f} GB/s, "
        f"products {ceilings['fp32_TFLOP_per_s']:.3g} TFLOP/s in fp32 and {ceilings['bf16_TFLOP_per_s']:.3g} in bf16."
    )


def headline(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The step with PCGrad, ours first, a row for each way and columns for each shape; unmeasured cells are empty."""
    cases = [row for row in rows if row["case"].endswith(METHOD)]
    shapes = list(dict.fromkeys(row["case"].split(",")[0] for row in cases))
    columns = [
        f"{shape}: {column}" for shape in shapes for column in ("ms", "ms in a row", "speed-up of ours", "peak memory")
    ]
    found = {(row["name"], row["case"].split(",")[0]): row for row in cases}
    cells = {
        name: [cell for shape in shapes for cell in _headline_cells(found, name, shape)]
        for name in sorted(dict.fromkeys(name for name, _ in found), key=lambda name: not name.startswith("ours"))
    }
    kept = [i for i in range(len(columns)) if any(row[i] for row in cells.values())]
    lines = [(name, "fp32" if name in FP32 else "bf16", *(row[i] for i in kept)) for name, row in cells.items()]
    return markdown.table(("step", "products in", *(columns[i] for i in kept)), lines)


def _headline_cells(found: Mapping[tuple[str, str], Mapping[str, Any]], name: str, shape: str) -> list[str]:
    row = found.get((name, shape), {})
    ours = found.get(("ours, fp32", shape)) if name in FP32 else None  # the same precision, where it was measured
    times = (ours or found.get(("ours", shape), {})).get("speedup", {}).get(name)
    median, pipelined, peak = row.get("median"), row.get("pipelined_ms"), row.get("peak_megabytes")
    return [
        _milliseconds(median) if median else "",
        _milliseconds(pipelined) if pipelined else "",
        f"{times:.1f}" if times else "",
        f"{peak:,.0f} MB" if peak else "",
    ]


def first_figures(results: Path = RESULTS) -> str:
    """The step's time on a CPU and on a GPU, against two baselines in the same precision: a sentence each."""

    def figures(device: str, shape: str) -> str:
        (row,) = (row for row in _load(results / f"{device}-step.json")["rows"] if _is_ours(row, shape))
        usual, stock = (f"{row['speedup'][name]:.0f} times as fast as" for name in ("naive, bf16", "transformers"))
        return f"{_milliseconds(row['median'])} ms, {usual} the usual course code and {stock} transformers"

    return (
        "A training step of three tasks with PCGrad, 32 examples each: with BERT-base on one H100 it takes "
        f"{figures('cuda', 'BERT-base')}, both without `torch.compile`. With MiniLM-L6 on two CPU cores it takes "
        f"{figures('cpu', 'MiniLM-L6')}. All products are in bf16."
    )


def _is_ours(row: Mapping[str, Any], shape: str) -> bool:
    return (row["name"], row["case"]) == ("ours", f"{shape}, {METHOD}")


def in_brief(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A few words: our step with PCGrad in each shape, and its speed relative to two baselines in each precision."""
    ours = [row for row in rows if row["name"] == "ours" and row["case"].endswith(METHOD) and row["median"]]
    parts = []
    for row in ours:
        full = next((r for r in rows if r["name"] == "ours, fp32" and r["case"] == row["case"]), None)
        naive = _ratios(row, full, "naive, bf16", "naive", "the naive step")
        rival = _ratios(row, full, "transformers", "transformers, fp32", "transformers")
        shown = ", ".join(text for text in (naive, rival) if text)
        parts.append(f"{row['case'].split(',')[0]}: {_milliseconds(row['median'])} ms a step, {shown}.")
    return [f"3 x 32 examples with PCGrad, sentence lengths of the course data. {' '.join(parts)}"]


def _ratios(low: Mapping[str, Any], full: Mapping[str, Any] | None, in_bf16: str, in_fp32: str, name: str) -> str:
    """How much faster our step is than a baseline, with both in bf16 and both in fp32; a mixed ratio says so."""
    found = {}
    if in_bf16 in low["speedup"]:
        found["both in bf16"] = low["speedup"][in_bf16]
    if full is not None and in_fp32 in full["speedup"]:
        found["both in fp32"] = full["speedup"][in_fp32]
    elif not found and in_fp32 in low["speedup"]:
        found["theirs in fp32"] = low["speedup"][in_fp32]
    parts: list[str] = []
    words = f" times as fast as {name}"  # after the first ratio alone
    for which, times in found.items():
        parts.append(f"{times:.1f}{'' if parts else words} ({which})")
    return " and ".join(parts)


def _step_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    costs = [f"{row['note']} ({row['case'].split(',')[0]})" for row in rows if row["name"] == "share"]
    fits = [row["note"] for row in rows if row["case"].endswith("scaling")]
    lines = candidates_table(rows, "pcgrad")
    if costs:
        lines.append(f"\nCost of PCGrad in our step, with and without it in alternation: {', '.join(costs)}.")
    return lines + [f"\nOver tokens and 1 to 16 tasks (MiniLM-L6 shape): {note}." for note in fits]


def candidates_table(rows: Sequence[Mapping[str, Any]], method: str) -> list[str]:
    """The timed candidates of the step suite under a surgery method, slowest first; unmeasured cells are empty."""
    wanted = [row for row in rows if row["median"] and row["case"].endswith(f"3 x 32 examples, {method}")]
    lines = []
    for case in _in_order(wanted):
        found = [row for row in wanted if row["case"] == case]
        for row in sorted(found, key=lambda row: -row["median"]):
            naive, rival = (
                "1" if row["name"] == other else f"{row['speedup'][other]:.1f}" if other in row["speedup"] else ""
                for other in ("naive", "transformers")
            )
            tokens, share = f"{row['tokens_per_second']:,.0f}", _filled("{:.0%}", row["of_product"])
            memory = _filled("{:,.0f} MB", row["working_megabytes"])
            ms = _milliseconds(row["median"])
            lines.append((case.split(",")[0], row["name"], ms, tokens, naive, rival, share, memory))
    head = ("shape", "step", "ms", "real tokens/s", "speed over naive", "over transformers", "of product ceiling")
    return markdown.table((*head, "working memory"), lines)


def _surgery_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    wanted = [row for row in rows if row["median"] and "T=3, float32, random" in row["case"]]
    for case in _in_order(wanted):
        found = [row for row in wanted if row["case"] == case]
        (ours,) = (row for row in found if row["name"] == "ours")
        size, op = case.split(", random: ")
        for row in found:
            times = ours["speedup"].get(row["name"])
            share = _filled("{:.0%}", row["of_copy"])
            faster = f"{times:.1f}" if times else ""
            lines.append((size, op, row["name"], _milliseconds(row["median"]), share, faster))
    return markdown.table(("J", "op", "way", "ms", "of a copy", "speed-up of ours"), lines)


def _encode_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["median"]:
            ways = {name: name.split(",")[0].partition(" ")[2] for name in row["speedup"]}  # fp32, bf16 or none
            times = ", ".join(f"{x:.1f}{ways[name] and f' ({ways[name]})'}" for name, x in row["speedup"].items())
            mine = row["name"].startswith("ours")
            lines.append((row["case"], row["name"], _milliseconds(row["median"]), times if mine else ""))
    return markdown.table(("sentences", "way", "ms", "speed-up over sentence-transformers"), lines)


def _any_model_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Times relative to the step without surgery: ratios, because the machine's load changes the milliseconds."""
    lines: list[tuple[str, str, str]] = []
    for case in _in_order(rows):
        found = [row for row in rows if row["case"] == case and row["median"]]
        floor = next((row["median"] for row in found if row["name"] == "summed losses"), None)
        lines += [(case, row["name"], f"{row['median'] / floor:.2f}") for row in found if floor]
    return markdown.table(("model", "step", "times the step of the summed losses"), lines)


def conflicts_table(results: Path = RESULTS) -> str:
    """Cosines between the tasks' gradients in a real run."""
    return conflicts.table(_load(results / "conflicts.json"))


def methods_table(results: Path = RESULTS) -> str:
    """The comparison of multitask methods on real data."""
    path = results / "methods-cpu.json"
    if not path.exists():
        return f"Not measured yet: the command's `table.json` becomes `benchmarks/results/{path.name}`."
    return compare.markdown(_load(path)).rstrip()


def same_job(folder: Path = ROOT / "docs" / "examples" / "same_job") -> str:
    """Lines of code of one job in three libraries: those of its example files, without comments and blank lines."""
    rows = {
        "with_minbert_fast": ("minbert_fast", "encoder, both heads, names of classes"),
        "with_sentence_transformers": ("sentence-transformers", "encoder; the head of single texts by hand"),
        "with_transformers": ("transformers", "encoder; the head of single texts by hand"),
    }
    lines = []
    for name, (library, saved) in rows.items():
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        del tree.body[0]  # the docstring
        used = {node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")}
        used |= {node.end_lineno for node in ast.walk(tree) if hasattr(node, "end_lineno")}
        lines.append((f"[{library}](docs/examples/same_job/{name}.py)", str(len(used)), saved))
    return "\n".join(markdown.table(("library", "lines of code", "what it saves"), lines))


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _in_order(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def _filled(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


SUITES: Mapping[str, Table] = {
    "step": _step_table,
    "surgery": _surgery_table,
    "encode": _encode_table,
    "encode_onnx": _encode_table,
    "any_model": _any_model_table,
}
TABLES: Mapping[str, Callable[[], str]] = (
    {
        "first figures": first_figures,
        "dev scores": dev_scores,
        "runs cuda": gpu_runs,
        "profile cuda": gpu_profile,
        "tests cuda": gpu_tests,
    }
    | {"ablation": ablation_table, "conflicts": conflicts_table, "methods": methods_table}
    | {"published": published_rows, "same job": same_job}
    | {f"{name} {device}": partial(suite, name, device) for name in SUITES for device in DEVICES}
    | {
        f"summed {device}": partial(suite, "step", device, table=partial(candidates_table, method="none"))
        for device in DEVICES
    }
    | {f"headline {device}": partial(suite, "step", device, table=headline) for device in DEVICES}
    | {f"place {device}": partial(suite, "step", device, table=lambda rows: []) for device in DEVICES}
    | {f"brief {device}": partial(suite, "step", device, table=in_brief) for device in DEVICES}
)


def write_figures(results: Path = RESULTS, folder: Path = FIGURES) -> None:
    """Draws the step suite's figures for each device that has results, and the measured conflicts."""
    if (results / "conflicts.json").exists():
        found = _load(results / "conflicts.json")
        (folder / "conflicts.svg").write_text(conflicts.figure(found), encoding="utf-8")
    for device in DEVICES:
        path = results / f"{device}-step.json"
        if path.exists():
            rows = _load(path)["rows"]
            (folder / f"step-{device}.svg").write_text(figures.speeds(rows), encoding="utf-8")
            if any(row["name"] == "ours, more examples" for row in rows):  # an interrupted measurement has none
                (folder / f"scaling-{device}.svg").write_text(figures.scaling(rows), encoding="utf-8")


def fill_tables(text: str) -> str:
    """`text` with every table between its marks regenerated."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table ([\w ]+?) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def main() -> int:
    """Rewrites or checks the pages; returns the exit status."""
    old = {page: page.read_text(encoding="utf-8") for page in PAGES}
    new = {page: fill_tables(text) for page, text in old.items()}
    if "--check" in sys.argv[1:]:
        return int(new != old)
    for page, text in new.items():
        page.write_text(text, encoding="utf-8")
    write_figures()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
