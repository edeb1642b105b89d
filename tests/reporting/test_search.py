# SPDX-License-Identifier: Apache-2.0
"""The report of a search: every trial against the searched values, on axes of these values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast.common.cli import run
from minbert_fast.report import main


def write_trials(directory: Path, trials: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    (directory / "table.json").write_text(json.dumps(trials))
    return directory


def trial(score: float | None, **values: str) -> dict[str, Any]:
    keys = {"lr": "optimizer.lr", "method": "surgery.method", "depth": "tasks.a.shared_depth"}
    named = {keys[key]: value for key, value in values.items()}
    if score is None:
        return {"values": named, "dev": {}, "failure": "out of memory <here>"}
    return {"values": named, "dev": {"score": score, "a_loss": 1 - score}, "failure": "", "metric": "score"}


def ticks(svg: str) -> dict[str, float]:
    """Labels of the x axis and their positions."""
    found = re.findall(r'<text x="([\d.]+)" y="246.0" text-anchor="\w+">([^<]+)<', svg)
    return {text: float(x) for x, text in found}


def dots(svg: str) -> list[tuple[float, float]]:
    path = re.findall(r'class="points s0" d="([^"]+)"', svg)[-1]  # the first one is in the legend
    return [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", path)]


def test_a_search_has_real_axes(tmp_path, capsys):
    trials = [
        trial(0.7, lr="1e-3", method="pcgrad", depth="2"), trial(0.6, lr="1e-4", method="none", depth="3"),
        trial(0.5, lr="1e-5", method="pcgrad", depth="4"), trial(0.4, lr="1e-5", method="none", depth="2"),
        trial(None, lr="1e-3", method="none", depth="2"),
    ]  # fmt: skip
    directory = write_trials(tmp_path / "search", trials)
    assert run(main, [str(directory)]) == 0
    assert capsys.readouterr().out.strip() == str(directory / "report.html")
    text = (directory / "report.html").read_text()
    assert "Best: optimizer.lr = 1e-3, surgery.method = pcgrad" in text
    assert "out of memory &lt;here&gt;" in text
    rate = (directory / "plots" / "search-optimizer.lr.svg").read_text()
    assert "optimizer.lr (logarithmic)" in rate
    places = ticks(rate)
    assert list(places) == ["1e-5", "1e-4", "1e-3"]
    assert places["1e-4"] - places["1e-5"] == pytest.approx(places["1e-3"] - places["1e-4"], abs=0.2)
    found = dots(rate)
    assert [x for x, _ in found] == [places[t] for t in ("1e-3", "1e-4", "1e-5", "1e-5")]
    assert [y for _, y in found] == sorted(y for _, y in found)  # the best score is the highest dot
    assert list(ticks((directory / "plots" / "search-surgery.method.svg").read_text())) == ["pcgrad", "none"]
    depth = ticks((directory / "plots" / "search-tasks.a.shared_depth.svg").read_text())
    assert depth["3"] - depth["2"] == pytest.approx(depth["4"] - depth["3"], abs=0.2)


def test_a_search_of_many_rates_has_ticks_at_powers_of_ten(tmp_path):
    rng = np.random.default_rng(0)
    rates = 10 ** rng.uniform(-5, -2, 40)
    directory = write_trials(tmp_path / "search", [trial(float(rng.random()), lr=repr(float(r))) for r in rates])
    assert run(main, [str(directory)]) == 0
    svg = (directory / "plots" / "search-optimizer.lr.svg").read_text()
    assert list(ticks(svg)) == ["1e-4", "1e-3"]
    assert len(dots(svg)) == 40


def test_the_lowest_error_of_a_search_is_its_best(tmp_path):
    errors = {("1e-3", "none"): 0.9, ("1e-3", "pcgrad"): 0.3, ("1e-4", "none"): 0.5, ("1e-4", "pcgrad"): 0.6}
    trials = [trial(0.0, lr=lr, method=method) for lr, method in errors]
    for one, error in zip(trials, errors.values(), strict=True):
        one |= {"dev": {"a_mae": error}, "metric": "a_mae"}
    directory = write_trials(tmp_path / "search", trials)
    assert run(main, [str(directory)]) == 0
    assert "Best: optimizer.lr = 1e-3, surgery.method = pcgrad" in (directory / "report.html").read_text()
    svg = (directory / "plots" / "search-optimizer.lr.svg").read_text()
    low, high = dots(svg)[2], dots(svg)[1]  # of each rate the lower error
    assert f"M{low[0]} {low[1]}L{high[0]} {high[1]}" in svg


def test_a_search_without_results_and_a_foreign_table(tmp_path, capsys):
    directory = write_trials(tmp_path / "search", [trial(None, lr="1")])
    assert run(main, [str(directory)]) == 0
    assert "Without a score" in (directory / "report.html").read_text()
    foreign = write_trials(tmp_path / "reproduce", [{"recipe": "a"}])
    capsys.readouterr()
    assert run(main, [str(foreign)]) == 2
    assert "expected the trials of a search" in capsys.readouterr().err
