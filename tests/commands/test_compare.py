# SPDX-License-Identifier: Apache-2.0
"""`compare`: names of methods, the numbers of its table by hand, and a small comparison that is interrupted and goes on."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minbert_fast import compare
from minbert_fast.common import cli
from minbert_fast.common.errors import InterruptError
from minbert_fast.common.schema import ConfigError
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.trainer import experiments
from minbert_fast.trainer.experiments import Trial
from tests.small import small_data

BASE = Recipe.load("demonstration")
METRICS = ("sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson")


def test_methods_are_split_outside_brackets() -> None:
    assert compare.split_methods("pcgrad, torchjd:Krum(n_byzantine=0, n_selected=2),pcgrad") == [
        "none", "pcgrad", "torchjd:Krum(n_byzantine=0, n_selected=2)",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="expected names separated by commas"):
        compare.split_methods("pcgrad,,mgda")


def test_a_method_is_surgery_loss_weights_or_both() -> None:
    both = compare.with_method(BASE, "cagrad+famo")
    assert (both.surgery.method, both.weighting.method) == ("cagrad", "famo")
    alone = compare.with_method(BASE.with_values({"surgery": {"method": "mgda"}}, "test"), "random")
    assert (alone.surgery.method, alone.weighting.method) == ("none", "random")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("pcgard", "expected one of none, pcgrad, .*; or of uncertainty, dwa, famo, random"),
        ("pcgrad+mgda", "at most one method of surgery and one of loss weights"),
        ("dwa+famo", "at most one method of surgery and one of loss weights"),
    ],
)
def test_unknown_methods_are_refused(method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.with_method(BASE, method)


def test_a_stage_with_its_own_method_is_refused() -> None:
    staged = BASE.with_values({"stages": [{"surgery": {"method": "pcgrad"}}]}, "test")
    with pytest.raises(ConfigError, match=r"stages\[0\] sets surgery, which --methods chooses"):
        compare.with_method(staged, "mgda")


def made_trial(folder: Path, method: str, seed: int, scores: tuple[float, float, float], seconds: float) -> Trial:
    directory = folder / method / f"seed-{seed}"
    directory.mkdir(parents=True)
    rows = [{"step": 1, "conflicts": 0.25, "dev/score": 0.1}, {"step": 2, "conflicts": 0.75, "dev/score": 0.2}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dev = dict(zip(METRICS, scores, strict=True)) | {"score": sum(scores) / 3}
    summary: dict[str, Any] = {
        "dev": dev,
        "steps": 10,
        "seconds": 9.0,
        "timings": {"forward": seconds, "evaluation": 99.0},
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    return Trial(f"{method}, seed {seed}", directory, summary)


def test_the_numbers_of_the_table_by_hand(tmp_path: Path) -> None:
    scores = {
        ("none", 1): (0.50, 0.80, 0.40), ("none", 2): (0.40, 0.80, 0.50),
        ("mgda", 1): (0.55, 0.80, 0.44), ("mgda", 2): (0.42, 0.84, 0.50),
    }  # fmt: skip
    trials = {key: made_trial(tmp_path, *key, value, 2.0 if key[0] == "none" else 3.0) for key, value in scores.items()}
    result = compare.compare(BASE, ["none", "mgda"], trials) | {"command": "python -m minbert_fast.compare"}
    none, mgda = result["rows"]
    changes = [(0.10 + 0.0 + 0.10) / 3, (0.05 + 0.05 + 0.0) / 3]
    assert mgda["change"]["mean"] == pytest.approx(sum(changes) / 2)
    assert mgda["change"]["sd"] == pytest.approx(abs(changes[0] - changes[1]) / math.sqrt(2))
    t = (sum(changes) / 2) / (abs(changes[0] - changes[1]) / 2)
    assert mgda["p"] == pytest.approx(1 - 2 / math.pi * math.atan(t))  # one degree of freedom
    assert mgda["p_adjusted"] == mgda["p"]
    assert none["change"] is None
    assert none["p"] is None
    assert mgda["dev"]["sentiment_accuracy"]["mean"] == pytest.approx(0.485)
    assert mgda["conflicts"]["mean"] == 0.5
    assert (none["step_seconds"], mgda["step_seconds"]) == (0.2, 0.3)  # evaluations do not count
    compare.write_results(tmp_path, result)
    assert "+5.00 ± 2.36" in (tmp_path / "table.md").read_text()
    assert r"$\mathbf{0.820 \pm 0.028}$" in (tmp_path / "table.tex").read_text()
    with (tmp_path / "table.csv").open() as file:
        (_, row) = csv.DictReader(file)
    assert float(row["change"]) == pytest.approx(0.05)
    page = (tmp_path / "comparison.html").read_text()
    assert "<td>mgda</td>" in page
    assert "<svg" in page  # two evaluations make a curve


def test_data_that_the_recipe_names_are_no_embedded_sample(tmp_path: Path) -> None:
    base = BASE.with_values({"tasks": {"sentiment": {"data": "mine.csv"}}}, "test")
    trials = {(method, 1): made_trial(tmp_path, method, 1, (0.5, 0.8, 0.4), 1.0) for method in ("none", "mgda")}
    compare.write_results(tmp_path, compare.compare(base, ["none", "mgda"], trials) | {"command": ""})
    assert "on the recipe's own data, 10 steps" in (tmp_path / "table.md").read_text()


def test_equal_scores_are_both_bold(tmp_path: Path) -> None:
    """Named after the bug: of equal scores, as small dev sets have them, only the first method's was bold in table.tex."""
    scores = {"none": (0.5, 0.4, 0.1), "mgda": (0.5, 0.3, 0.2)}
    trials = {(method, 1): made_trial(tmp_path, method, 1, each, 1.0) for method, each in scores.items()}
    text = compare.latex(compare.compare(BASE, ["none", "mgda"], trials))
    assert text.count(r"$\mathbf{0.500}$") == 2
    assert text.count(r"$\mathbf{0.400}$") == text.count(r"$\mathbf{0.200}$") == 1


def test_a_lower_error_is_a_better_one(tmp_path: Path) -> None:
    base = BASE.with_values({"tasks": {"similarity": {"metric": "mae"}}}, "test")
    trials = {(method, 1): made_trial(tmp_path, method, 1, (0.5, 0.8, 0.4), 1.0) for method in ("none", "mgda")}
    for method, error in (("none", 2.0), ("mgda", 1.0)):
        trials[method, 1].summary["dev"]["similarity_mae"] = error
    result = compare.compare(base, ["none", "mgda"], trials) | {"command": "python -m minbert_fast.compare"}
    assert result["rows"][1]["change"]["mean"] == pytest.approx((0.0 + 0.0 + 0.5) / 3)
    assert r"$\mathbf{1.000}$" in compare.latex(result)


def test_a_seed_that_failed_is_named_and_not_paired(tmp_path: Path) -> None:
    trials = {("none", seed): made_trial(tmp_path, "none", seed, (0.5, 0.8, 0.4), 1.0) for seed in (1, 2)}
    trials["mgda", 1] = made_trial(tmp_path, "mgda", 1, (0.6, 0.8, 0.4), 1.0)
    trials["mgda", 2] = Trial("mgda, seed 2", tmp_path, failure="out of memory")
    (_, mgda) = compare.compare(BASE, ["none", "mgda"], trials)["rows"]
    assert mgda["runs"] == 1
    assert mgda["p"] is None
    assert mgda["failure"] == "out of memory"


def test_the_notes_leave_out_what_runs_that_all_failed_do_not_tell(tmp_path: Path) -> None:
    """The table said "None steps, , torch None, commit None"."""
    trials = {(method, 1): Trial(method, tmp_path, failure="no data") for method in ("none", "mgda")}
    notes = compare.notes(compare.compare(BASE, ["none", "mgda"], trials))
    assert notes[1].endswith(" on the embedded sample.")
    assert "mgda: no data" in notes


@pytest.mark.ci
def test_a_comparison_is_interrupted_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path / "data")
    flags = [
        "--methods", "pcgrad,famo", "--seeds", "2", "--data", str(data), "--output", str(tmp_path / "out"),
        "--device", "cpu", "--recipe", "demonstration", "--max-steps", "1", "--set", f"data.cache={data / 'cache'}", "--set",
        "training.precision=fp32", "--set", "logging.every=1",
    ]  # fmt: skip
    begun: list[Path] = []
    train = experiments.train

    def counted(recipe: Recipe, options: Any) -> Path:
        begun.append(options.output)
        assert options.again.startswith("python -m minbert_fast.compare --methods"), "what an interruption advises"
        if len(begun) == 4:
            train(recipe, replace(options, stop_after=0))  # leaves a checkpoint, from which the run must go on
            raise InterruptError(15, "stopped")
        return train(recipe, options)

    monkeypatch.setattr(experiments, "train", counted)
    assert cli.run(compare.main, flags) == 128 + 15
    assert len(json.loads((tmp_path / "out" / "table.json").read_text())["runs"]) == 3
    assert [begun[0].name, begun[3].name] == [f"seed-{BASE.training.seed + i}" for i in range(2)]
    report = begun[0] / "report.html"
    report.unlink()  # a kill may come before the report is written
    begun[:] = [Path("a"), Path("b"), Path("c"), Path("d")]  # no further interruption
    assert cli.run(compare.main, flags) == 0
    assert len(begun) == 4 + 3 + 1  # finished runs are read only
    assert report.is_file()
    result = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["none", "pcgrad", "famo"]
    assert all(row["runs"] == 2 and row["dev"]["score"] for row in result["rows"])
    assert result["rows"][1]["conflicts"] is not None
    assert "| pcgrad" in capsys.readouterr().out
    assert "<td>famo</td>" in (tmp_path / "out" / "comparison.html").read_text()


@pytest.mark.usefixtures("one_thread")
def test_a_finished_run_on_other_data_weights_backend_or_of_another_length_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was taken for the run that was asked for; later, table.md lost its scores to the line about the failure."""
    data = small_data(tmp_path / "data")
    moved, model = str(shutil.copytree(data, tmp_path / "other")), str(sample_directory().model)
    output = tmp_path / "out"
    flags = ["--methods", "none", "--seeds", "1", "--data", str(data), "--output", str(output), "--device", "cpu"]
    flags += ["--recipe", "demonstration", "--max-steps", "1"]
    assert cli.run(compare.main, flags) == 0
    table = (output / "table.md").read_bytes()
    for flag, value in (("--data", moved), ("--model", model), ("--backend", "reference"), ("--max-steps", "2")):
        capsys.readouterr()
        assert cli.run(compare.main, [*flags, flag, value]) == 2, flag
        assert (output / "table.md").read_bytes() == table
        printed = capsys.readouterr().err
        assert f"{output / 'none'}" in printed
        assert "holds a finished run" in printed
        assert "choose another --output" in printed
    assert cli.run(compare.main, flags) == 0, "the run itself is still read"
