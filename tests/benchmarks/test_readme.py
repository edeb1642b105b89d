# SPDX-License-Identifier: Apache-2.0
"""The tables and figures of README and docs come from results files; without one, a table shows the command to run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import conflicts, harness, readme
from benchmarks.harness import Row
from tests.reporting.test_report import make_run


def write(folder: Path, suite: str, rows: list[Row]) -> None:
    found = harness.report(torch.device("cpu"), harness.Ceilings(3e10, 1e11, 2e11), rows)
    (folder / f"cpu-{suite}.json").write_text(json.dumps(found))


def step_row(case: str, name: str, median: float, tokens: int = 2770, **more: Any) -> Row:
    row = Row(
        "step", case, name, median, median, median, 9, of_product=0.5, tokens=tokens, working_megabytes=10.0, **more
    )
    row.tokens_per_second = 1e3 * tokens / median
    return row


@pytest.fixture
def results(tmp_path: Path) -> Path:
    case = "MiniLM-L6, 3 x 32 examples, pcgrad"
    rows = [
        step_row(case, "ours", 500.0, speedup={"naive": 6.4, "transformers": 3.0}),
        step_row(case, "naive", 3200.0, speedup={"transformers": 0.47}),
        step_row(case, "transformers", 1500.0, speedup={"naive": 2.13}),
        Row("step", case, "transformers, compiled", note="WRONG RESULT, not timed: off"),
        step_row("MiniLM-L6, 3 x 32 examples, none", "ours", 400.0),
        step_row("MiniLM-L6, 3 x 32 examples, more examples", "ours, more examples", 450.0, 2600),
        step_row("MiniLM-L6, 3 x 8 examples, more examples", "ours, more examples", 130.0, 700),
        step_row("MiniLM-L6, 3 x 16 examples, more examples", "ours, more examples", 250.0, 1400),
        Row("step", "MiniLM-L6, scaling", "ours", note="off by 2.0% on average"),
    ]
    write(tmp_path, "step", rows)
    return tmp_path


def test_step_table_has_each_timed_candidate_slowest_first(results: Path) -> None:
    text = readme.suite("step", "cpu", results)
    lines = text.splitlines()
    assert lines[2] == "| MiniLM-L6 | naive | 3,200 | 866 | 1 | 0.5 | 50% | 10 MB |"
    assert lines[3] == "| MiniLM-L6 | transformers | 1,500 | 1,847 | 2.1 | 1 | 50% | 10 MB |"
    assert lines[4] == "| MiniLM-L6 | ours | 500 | 5,540 | 6.4 | 3.0 | 50% | 10 MB |"
    assert not lines[5]
    assert "compiled" not in text
    assert "off by 2.0% on average" in text
    assert "a copy 30 GB/s" in text


def test_the_headline_leaves_unmeasured_cells_empty(results: Path) -> None:
    path = results / "cpu-step.json"
    found = json.loads(path.read_text())
    for row in found["rows"]:
        if row["name"] == "ours" and row["case"].endswith("pcgrad"):
            row["pipelined_ms"] = 450.0
    other = {**found["rows"][0], "case": "BERT-base, 3 x 32 examples, pcgrad", "median": None, "speedup": {}}
    found["rows"].append({**other, "pipelined_ms": 1234.0})
    found["threads"] = found["load"] = None
    path.write_text(json.dumps(found))
    lines = readme.suite("step", "cpu", results, table=readme.headline).splitlines()
    columns = "MiniLM-L6: ms | MiniLM-L6: ms in a row | MiniLM-L6: speed-up of ours | BERT-base: ms in a row"
    assert lines[0] == f"| step | products in | {columns} |"
    assert lines[2] == "| ours | bf16 | 500 | 450 |  | 1,234 |"
    assert lines[3] == "| naive | fp32 | 3,200 |  | 6.4 |  |"
    assert lines[5] == "| transformers, compiled | bf16 |  |  |  |  |"
    assert "threads" not in lines[7]
    assert "load" not in lines[7]
    assert "torch" in lines[7]


def test_rows_without_ceilings_or_memory_have_empty_cells(tmp_path: Path) -> None:
    row = step_row("BERT-base, 3 x 32 examples, pcgrad", "ours", 7.0)
    row.of_product = row.working_megabytes = None
    write(tmp_path, "step", [row])
    line = readme.suite("step", "cpu", tmp_path).splitlines()[2]
    assert line == "| BERT-base | ours | 7.00 | 395,710 |  |  |  |  |"


def test_the_brief_is_made_from_the_measured_rows(results: Path) -> None:
    first = readme.suite("step", "cpu", results, table=readme.in_brief).splitlines()[0]
    assert first == (
        "3 x 32 examples with PCGrad, sentence lengths of the course data. MiniLM-L6: 500 ms a step, 6.4 times as fast as "
        "the naive step (theirs in fp32), 3.0 times as fast as transformers (both in bf16)."
    )


def test_the_first_figures_compare_in_one_precision(tmp_path: Path) -> None:
    cases = {"cpu": ("MiniLM-L6", 500.0), "cuda": ("BERT-base", 7.0)}
    for device, (shape, median) in cases.items():
        speedup = {"naive": 9.0, "naive, bf16": 5.0, "transformers": 3.0}
        rows = [{"case": f"{shape}, {readme.METHOD}", "name": "ours", "median": median, "speedup": speedup}]
        (tmp_path / f"{device}-step.json").write_text(json.dumps({"rows": rows}))
    text = readme.first_figures(tmp_path)
    ratios = "5 times as fast as the usual course code and 3 times as fast as transformers"
    assert f"BERT-base on one H100 it takes 7.00 ms, {ratios}, both" in text
    assert f"on two CPU cores it takes 500 ms, {ratios}." in text


def test_each_run_of_the_dev_scores_names_its_commit() -> None:
    found = [json.loads((readme.RESULTS / f"{run}-cpu.json").read_text()) for run in ("first-run", "best")]
    assert all(run["commit"][:7] in readme.dev_scores().splitlines()[-1] for run in found)


def test_the_brief_states_each_ratio_in_both_precisions() -> None:
    case = f"BERT-base, {readme.METHOD}"
    rows = [
        {
            "case": case,
            "name": "ours",
            "median": 7.0,
            "speedup": {"naive": 9.0, "naive, bf16": 5.0, "transformers": 3.0},
        },
        {"case": case, "name": "ours, fp32", "median": 14.0, "speedup": {"naive": 4.5, "transformers, fp32": 2.0}},
    ]
    (text,) = readme.in_brief(rows)
    assert "5.0 times as fast as the naive step (both in bf16) and 4.5 (both in fp32)" in text
    assert "3.0 times as fast as transformers (both in bf16) and 2.0 (both in fp32)" in text
    assert "9.0" not in text
    table = readme.headline([*rows, {"case": case, "name": "naive", "median": 63.0, "speedup": {}}])
    assert next(line for line in table if line.startswith("| naive")) == "| naive | fp32 | 63.0 | 4.5 |"


def test_other_models_are_compared_by_ratios(tmp_path: Path) -> None:
    rows = [Row("any_model", "a net", name, median=time) for name, time in (("ours", 150.0), ("summed losses", 100.0))]
    write(tmp_path, "any_model", rows)
    assert "| a net | ours | 1.50 |" in readme.suite("any_model", "cpu", tmp_path).splitlines()


def test_the_comparison_of_methods_is_a_file_or_a_sentence(tmp_path: Path) -> None:
    assert "Not measured yet" in readme.methods_table(tmp_path)


def test_a_profile_is_a_table_with_its_sums(tmp_path: Path) -> None:
    rows = [
        {"shape": shape, "kernels": kernels, "microseconds": time, "launches": 2.0}
        for shape, kernels, time in (("A", "x", 10.0), ("A", "y", 5.0), ("B", "x", 3.0), ("B", "y", 1.0))
    ]
    found = {"commit": "abc", "device": "a GPU", "note": "per step", "rows": rows}
    (tmp_path / "cuda-profile.json").write_text(json.dumps(found))
    lines = readme.gpu_profile(tmp_path).splitlines()
    assert lines[0] == "| kernels | A: us | A: launches | B: us | B: launches |"
    assert lines[2] == "| x | 10 | 2 | 3 | 2 |"
    assert lines[4] == "| all | 15 | 4 | 4 | 4 |"


def test_the_gpu_tests_become_a_sentence(tmp_path: Path) -> None:
    found = {
        "commit": "abc",
        "device": "a GPU",
        "tests": {"passed": 7, "of": 9},
        "memcheck": {"tests": "tests/surgery", "count": 5, "errors": 0},
    }
    (tmp_path / "cuda-tests.json").write_text(json.dumps(found))
    text = readme.gpu_tests(tmp_path)
    assert text == (
        "Commit abc on a GPU: 7 of 9 GPU tests passed. memcheck over the 5 tests of `tests/surgery` found 0 errors."
    )


def test_steps_without_surgery_have_their_own_table(results: Path) -> None:
    lines = readme.suite("step", "cpu", results, table=partial(readme.candidates_table, method="none")).splitlines()
    assert lines[2] == "| MiniLM-L6 | ours | 400 | 6,925 |  |  | 50% | 10 MB |"
    assert not lines[3]


def test_surgery_and_encode_tables(tmp_path: Path) -> None:
    case = "BERT-base, T=3, float32, random: gram"
    ours = Row("surgery", case, "ours", 40.0, 40.0, 40.0, 9, of_copy=0.9, speedup={"J @ J.T": 5.5})
    write(tmp_path, "surgery", [ours, Row("surgery", case, "J @ J.T", 220.0, 220.0, 220.0, 9, of_copy=0.16)])
    assert "| BERT-base, T=3, float32 | gram | ours | 40.0 | 90% |  |" in readme.suite("surgery", "cpu", tmp_path)
    assert "| BERT-base, T=3, float32 | gram | J @ J.T | 220 | 16% | 5.5 |" in readme.suite("surgery", "cpu", tmp_path)
    mine = Row(
        "encode", "MiniLM-L6", "ours fp32", 100.0, 1, 1, 9, speedup={"sentence-transformers fp32, batch 32": 3.2}
    )
    write(tmp_path, "encode", [mine])
    assert "| MiniLM-L6 | ours fp32 | 100 | 3.2 (fp32) |" in readme.suite("encode", "cpu", tmp_path)


def test_a_suite_without_results_names_the_command(tmp_path: Path) -> None:
    assert "python -m benchmarks.run step --device cuda" in readme.suite("step", "cuda", tmp_path)


def test_figures_show_every_value(results: Path, tmp_path: Path) -> None:
    readme.write_figures(results, tmp_path)
    bars = ElementTree.parse(tmp_path / "step-cpu.svg").getroot()
    texts = [node.text for node in bars.iter() if node.tag.endswith("text")]
    assert {"ours", "naive", "866", "5,540"} <= set(texts)
    scaling = (tmp_path / "scaling-cpu.svg").read_text()
    assert scaling.count("h0") >= 3
    assert "12 + 0.169 x tokens" in scaling


def test_conflicts_of_a_run_give_a_table_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")  # two pairs: each has cosine -0.25 in ten of the 40 steps, else 0.5
    monkeypatch.setattr(conflicts, "RESULTS", tmp_path / "conflicts.json")
    assert conflicts.main([str(run), "tiny"]) == 0
    text = readme.conflicts_table(tmp_path)
    assert "| sentiment · similarity | +0.312 | 0.438 | -0.250 | 25% |" in text
    assert "in 50% of the steps" in text, "the pairs' steps differ"
    assert "tiny, pcgrad, 40 steps, fp32 products on a cpu, torch 2.99" in text
    readme.write_figures(tmp_path, tmp_path)
    ElementTree.parse(tmp_path / "conflicts.svg")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/a": 1.0}\n')
    with pytest.raises(SystemExit, match="no cosines"):
        conflicts.main([str(run), "tiny"])


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_pages_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.fill_tables(text) == text
