# SPDX-License-Identifier: Apache-2.0
"""Methods of surgery by name, from the command line to a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minbert_fast import surgery, train
from minbert_fast.common import cli
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import Backend, make_step
from minbert_fast.surgery.torchjd import UNFIT
from tests.small import read_records, small_data, small_run
from tests.step.test_step import PLAIN, SIZES, make_batch, make_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def losses(data: Path, output: Path, method: str, *more: str) -> list[list[float]]:
    """The tasks' losses of every step of a small run."""
    constant = ("--set", "optimizer.schedule=constant", "--set", "optimizer.warmup=0")
    flags = ("--surgery", method, "--dropout", "0", "--lr", "1e-3", *constant, "--max-steps", "4", *more)
    assert cli.run(train.main, small_run(data, output, "--recipe", "demonstration", *flags)) == 0
    assert Recipe.load(str(output / "best" / "recipe.toml")).surgery.method == method
    return [
        [value for key, value in row.items() if key.startswith("loss/")] for row in read_records(output) if "lr" in row
    ]


TORCHJD = (
    "AlignedMTL", "CAGrad(c=0.4)", "Constant(weights=[1.0, 2.0, 0.5])", "DualProj", "FairGrad(alpha=1.0)", "GradVac",
    "IMTLG", "Krum(n_byzantine=0)", "Mean", "MGDA", "PCD", "PCGrad", "Random", "Sum", "UPGrad",
)  # fmt: skip
NEEDS = {"torchjd:CAGrad(c=0.4)": "clarabel", "torchjd:FairGrad(alpha=1.0)": "scipy"}  # packages beside TorchJD


@pytest.mark.ci
@pytest.mark.parametrize("backend", ["fast", "reference"])
@pytest.mark.parametrize("method", [*surgery.METHODS, *(f"torchjd:{name}" for name in TORCHJD)])
def test_every_method_trains(method: str, backend: Backend) -> None:
    if method.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    if method in NEEDS:
        pytest.importorskip(NEEDS[method])
    chosen = Recipe().with_values({"surgery": {"method": method}, "tasks": PLAIN}, "test")
    model = make_model(chosen)
    step = make_step(backend, model, chosen, torch.float32)
    before = [p.clone() for p in model.encoder.bert_layers.parameters()]
    for index in range(2):
        assert torch.isfinite(step(make_batch(model, SIZES, seed=index), 1.0).losses).all()
    for p, q in zip(model.encoder.bert_layers.parameters(), before, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, q)


def test_the_list_of_torchjds_weightings_is_complete() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    all_of_them = {name.removesuffix("Weighting") for name in aggregation.__all__ if name.endswith("Weighting")} - {""}
    assert all_of_them == {name.partition("(")[0] for name in TORCHJD} | set(UNFIT)


@pytest.mark.parametrize(("method", "backend"), [("torchjd:PCD", "fast"), ("gradvac", "reference")])
def test_a_resumed_run_has_the_methods_state(data: Path, tmp_path: Path, method: str, backend: str) -> None:
    if method.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    whole = losses(data, tmp_path / "whole", method, "--backend", backend)
    first = losses(data, tmp_path / "parts", method, "--backend", backend, "--stop-after", "2")
    assert first == whole[:2]
    assert losses(data, tmp_path / "parts", method, "--backend", backend, "--resume") == whole


def test_a_reduction_without_effect_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--surgery", "torchjd:MGDA", "--set", "surgery.reduction=mean")
    assert cli.run(train.main, small_run(data, tmp_path / "run", *flags)) != 0
    assert 'gives the weights themselves: reduction = "mean" has no effect on it' in capsys.readouterr().err


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
