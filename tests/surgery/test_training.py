# SPDX-License-Identifier: Apache-2.0
"""Methods of surgery by name, from the command line to a trained model, on both backends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.recipes.recipe import Recipe
from tests.small import small_data, small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def losses(data: Path, output: Path, method: str, *more: str) -> list[list[float]]:
    """The tasks' losses of every step of a small run."""
    constant = ("--set", "optimizer.schedule=constant", "--set", "optimizer.warmup=0")
    flags = ("--surgery", method, "--dropout", "0", "--lr", "1e-3", *constant, "--max-steps", "4", *more)
    assert cli.run(train.main, small_run(data, output, "--recipe", "demonstration", *flags)) == 0
    assert Recipe.load(str(output / "best" / "recipe.toml")).surgery.method == method
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [[value for key, value in row.items() if key.startswith("loss/")] for row in rows if "lr" in row]


@pytest.mark.parametrize("method", ["torchjd:MGDA", "torchjd:Krum(n_byzantine=0)", "gradvac", "imtl_g", "nash_mtl"])
def test_both_backends_train_alike(data: Path, tmp_path: Path, method: str) -> None:
    if method.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    fast = losses(data, tmp_path / "fast", method, "--backend", "fast")
    reference = losses(data, tmp_path / "reference", method, "--backend", "reference")
    assert len(fast) == 4
    for ours, theirs in zip(fast, reference, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_gradvac_resumes_with_its_targets(data: Path, tmp_path: Path, backend: str) -> None:
    whole = losses(data, tmp_path / "whole", "gradvac", "--backend", backend)
    first = losses(data, tmp_path / "parts", "gradvac", "--backend", backend, "--stop-after", "2")
    assert first == whole[:2]
    assert losses(data, tmp_path / "parts", "gradvac", "--backend", backend, "--resume") == whole


def test_recipes_name_torchjd(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('[surgery]\nmethod = "torchjd:Krum(n_byzantine=0)"\n', encoding="utf-8")
    assert Recipe.load(str(path)).surgery.method == "torchjd:Krum(n_byzantine=0)"


def test_an_unknown_torchjd_method_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchjd.aggregation")
    assert cli.run(train.main, small_run(data, tmp_path / "run", "--surgery", "torchjd:NoSuch")) != 0
    error = capsys.readouterr().err.strip()
    assert "surgery method 'torchjd:NoSuch': expected one of " in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
