# SPDX-License-Identifier: Apache-2.0
"""The tables and figures of README and docs come from results files, and say so where there are none."""

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
from tests.test_report import make_run


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


def test_steps_without_surgery_have_a_table_of_their_own(results: Path) -> None:
    lines = readme.suite("step", "cpu", results, table=partial(readme.ways, method="none")).splitlines()
    assert lines[2] == "| MiniLM-L6 | ours | 400 | 6,925 |  |  | 50% | 10 MB |"
    assert not lines[3]


def test_surgery_and_encode_tables(tmp_path: Path) -> None:
    case = "BERT-base, T=3, float32, random: gram"
    ours = Row("surgery", case, "ours", 40.0, 40.0, 40.0, 9, of_copy=0.9, speedup={"J @ J.T": 5.5})
    write(tmp_path, "surgery", [ours, Row("surgery", case, "J @ J.T", 220.0, 220.0, 220.0, 9, of_copy=0.16)])
    assert "| BERT-base, T=3, float32 | gram | ours | 40 | 90% |  |" in readme.suite("surgery", "cpu", tmp_path)
    assert "| BERT-base, T=3, float32 | gram | J @ J.T | 220 | 16% | 5.5 |" in readme.suite("surgery", "cpu", tmp_path)
    mine = Row(
        "encode", "MiniLM-L6", "ours fp32", 100.0, 1, 1, 9, speedup={"sentence-transformers fp32, batch 32": 3.2}
    )
    write(tmp_path, "encode", [mine])
    assert "| MiniLM-L6 | ours fp32 | 100 | 3.2 (fp32) |" in readme.suite("encode", "cpu", tmp_path)


def test_a_suite_without_results_says_how_to_get_them(tmp_path: Path) -> None:
    assert "python -m benchmarks.run step --device cuda" in readme.suite("step", "cuda", tmp_path)


def test_figures_are_drawings_with_every_value(results: Path, tmp_path: Path) -> None:
    readme.draw(results, tmp_path)
    bars = ElementTree.parse(tmp_path / "step-cpu.svg").getroot()
    texts = [node.text for node in bars.iter() if node.tag.endswith("text")]
    assert {"ours", "naive", "866", "5,540"} <= set(texts)
    scaling = (tmp_path / "scaling-cpu.svg").read_text()
    assert scaling.count("h0") >= 3
    assert "12 + 0.169 x tokens" in scaling


def test_conflicts_of_a_run_become_a_table_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")  # every fourth of its 40 steps has cosine -0.25, the others 0.5
    monkeypatch.setattr(conflicts, "RESULTS", tmp_path / "conflicts.json")
    assert conflicts.main([str(run), "tiny"]) == 0
    text = readme.measured_conflicts(tmp_path)
    assert "| sentiment · similarity | +0.312 | 0.438 | -0.250 | 25% |" in text
    assert "in 25% of the steps" in text
    assert "tiny, pcgrad, 40 steps, fp32 products on a cpu, torch 2.99" in text
    readme.draw(tmp_path, tmp_path)
    ElementTree.parse(tmp_path / "conflicts.svg")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss/a": 1.0}\n')
    with pytest.raises(SystemExit, match="no cosines"):
        conflicts.main([str(run), "tiny"])


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_the_pages_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert readme.filled(text) == text
