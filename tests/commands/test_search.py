# SPDX-License-Identifier: Apache-2.0
"""Searches with Optuna: ranges, pruning, resumption. A stand-in takes the place of training but in the last test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from minbert_fast import search
from minbert_fast.common import cli
from minbert_fast.trainer import experiments
from minbert_fast.trainer.callbacks import Callback, EvaluationEvent
from minbert_fast.trainer.experiments import Trial
from tests.small import error_line, small_data

EVALUATIONS = (5, 10, 15)


class Trainings:
    """Runs whose score is best at lr = 3e-3.

    `interrupt_at` is the number of the run that stops the search, `fail_at` of the one that fails.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.interrupt_at = self.fail_at = -1

    def run(self, name: str, recipe: Any, directory: Path, *_: Any, callbacks: Sequence[Callback] = ()) -> Trial:
        self.begun.append(name)
        if len(self.begun) == self.interrupt_at:
            raise KeyboardInterrupt
        if len(self.begun) == self.fail_at:
            return Trial(name, directory, failure="no room")
        final = 1 - abs(recipe.optimizer.lr - 3e-3) * 100 - (0.5 if recipe.surgery.method == "none" else 0)
        finished, dev, step = True, {}, 0
        for step in (0, *EVALUATIONS):
            score = final * step / EVALUATIONS[-1]
            dev = {"score": score, "sentiment_loss": 1 - score}
            asked = [callback.on_evaluation(EvaluationEvent(step, dev, True)) for callback in callbacks]
            if any(asked) and step < EVALUATIONS[-1]:
                finished = False
                break
        directory.mkdir(parents=True, exist_ok=True)
        summary = {"dev": dev, "steps": step, "finished": finished, "backend": "fast"}
        (directory / "summary.json").write_text(json.dumps(summary))
        return Trial(name, directory, summary)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    found = Trainings()
    monkeypatch.setattr(experiments, "run_or_resume", found.run)
    return found


def run(output: Path, *more: str) -> int:
    return cli.run(search.main, ["--output", str(output), "--max-steps", "15", *more])


SPACE = ("--range", "lr=1e-4..1e-2", "--grid", "surgery=none,pcgrad")


@pytest.mark.ci
def test_ranges_are_searched_and_weak_runs_are_pruned(trainings: Trainings, tmp_path: Path) -> None:
    assert run(tmp_path, *SPACE, "--optuna", "20") == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    rates = [float(row["values"]["optimizer.lr"]) for row in rows]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 1e-3 < rates[0] < 6e-3, "the best one is near the optimum"
    assert sum(rate < 1e-3 for rate in rates) > 4, "drawn by its logarithm"
    assert len(trainings.begun) == len(rows)
    table = (tmp_path / "table.md").read_text()
    assert " (pruned) " in table
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    states = [trial.state for trial in study.trials]
    assert len(states) == 20
    assert not any(0 in trial.intermediate_values for trial in study.trials), "the score before training does not count"
    assert states.count(optuna.trial.TrialState.PRUNED) == table.count("(pruned)") > 0
    study._storage._backend.engine.dispose()


def test_the_best_trial_has_the_highest_score_or_the_lowest_loss(trainings: Trainings, tmp_path: Path) -> None:
    for seed, metric, direction in (("0", "score", "MAXIMIZE"), ("1", "sentiment_loss", "MINIMIZE")):
        output = tmp_path / metric
        assert run(output, *SPACE, "--optuna", "3", "--metric", metric, "--seed", seed) == 0
        study = optuna.load_study(study_name="search", storage=f"sqlite:///{output / 'optuna.db'}")
        assert study.direction.name == direction
        first = json.loads((output / "table.json").read_text())[0]["values"]
        assert first["optimizer.lr"] == f"{study.best_params['optimizer.lr']:.3g}"
        study._storage._backend.engine.dispose()
    assert trainings.begun[0] != trainings.begun[3], "another seed proposes other values"


def test_an_interrupted_search_goes_on(trainings: Trainings, tmp_path: Path) -> None:
    """It proposed other values than an uninterrupted search with the same seed."""
    assert run(tmp_path / "whole", *SPACE, "--optuna", "4") == 0
    whole = json.loads((tmp_path / "whole" / "table.json").read_text())
    trainings.begun.clear()
    trainings.interrupt_at = 2
    assert run(tmp_path, *SPACE, "--optuna", "3") == 130
    interrupted = trainings.begun[-1]
    trainings.begun.clear()
    trainings.interrupt_at = -1
    assert run(tmp_path, *SPACE, "--optuna", "3") == 0
    assert trainings.begun[0] == interrupted
    assert len(trainings.begun) == 2, "one of three was done"
    assert len(json.loads((tmp_path / "table.json").read_text())) == 3
    trainings.begun.clear()
    assert run(tmp_path, *SPACE, "--optuna", "3") == 0
    assert trainings.begun == []
    assert run(tmp_path, *SPACE, "--optuna", "4") == 0
    assert len(trainings.begun) == 1
    assert json.loads((tmp_path / "table.json").read_text()) == whole


def test_a_search_of_which_a_part_failed_says_so(
    trainings: Trainings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The status was 0 as long as one combination had run, so that a script took its scores for those of all."""
    trainings.fail_at = 2
    assert run(tmp_path, "--grid", "lr=1e-4,2e-4,3e-4") == 1
    assert capsys.readouterr().err == "error: 1 of 3 combinations failed: lr=2e-4\n"
    assert len(json.loads((tmp_path / "table.json").read_text())) == 3, "the others ran"


def test_a_study_of_other_values_is_not_continued(
    trainings: Trainings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--range", "batch-size=4..8", "--optuna", "1") == 0
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["values"]["training.batch_size"] in "45678"
    assert run(tmp_path, "--range", "batch-size=4..9", "--optuna", "2") == 2
    assert "holds another search (training.batch_size 4..8, metric score)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "expected --grid KEY=A,B,... or --range KEY=LOW..HIGH"),
        (["--range", "lr=1e-5..1e-4"], "--range lr=1e-5..1e-4: --optuna N says how many values to try"),
        (["--range", "lr=1e-4..1e-5", "--optuna", "2"], "--range 'lr=1e-4..1e-5': expected KEY=LOW..HIGH"),
        (["--range", "lr=fast", "--optuna", "2"], "expected KEY=LOW..HIGH, such as lr=1e-5..1e-4"),
        (["--range", "batch-size=0..8", "--optuna", "2"], "batch_size = 0: expected 1 or more"),
        (["--range", "nothing=1..2", "--optuna", "2"], "unknown key 'nothing'"),
        (["--range", "lr=1..2", "--range", "optimizer.lr=3..4", "--optuna", "2"], "--range optimizer.lr: given twice"),
        (["--grid", "lr=1", "--range", "lr=1..2", "--optuna", "2"], "--grid and --range optimizer.lr: choose one"),
        (
            ["--grid", "lr=1e-4", "--seed", "3"],
            "--seed 3: needs --random or --optuna; the seed of the runs is --grid seed=",
        ),
        (["--grid", "surgery=none,pcgard"], "--grid: surgery method 'pcgard': expected one of none, pcgrad"),
        (["--grid", "lr=1e-4", "--random", "0"], "--random: '0': expected a whole number, 1 or more"),
    ],
)
def test_mistakes_are_one_line_before_any_run(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *arguments) == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_grid_in_two_parts_and_a_range_of_large_whole_numbers(trainings: Trainings, tmp_path: Path) -> None:
    """The first part was ignored, and 1500000 was written as 1.5e+06, which is no whole number."""
    assert run(tmp_path / "grid", "--grid", "lr=1e-4,2e-4", "--grid", "optimizer.lr=3e-4") == 0
    assert trainings.begun == ["lr=1e-4", "lr=2e-4", "lr=3e-4"]
    assert run(tmp_path / "range", "--range", "training.seed=1500000..1500001", "--optuna", "1") == 0
    assert trainings.begun[-1] in ("seed=1500000", "seed=1500001")


def test_the_table_says_why_a_combination_failed(tmp_path: Path) -> None:
    trials = [({"optimizer.lr": "9"}, Trial("lr=9", tmp_path, failure="ten steps in a row were not finite"))]
    search.write_results(tmp_path, {"optimizer.lr": ["9"]}, trials, "score")
    assert (tmp_path / "table.md").read_text().endswith("\n\nlr=9: ten steps in a row were not finite\n")


def test_values_of_a_grid_may_be_lists() -> None:
    """--grid optimizer.betas=[0.9,0.98] was two values, [0.9 and 0.98]; a method of surgery with two options was too."""
    methods = ["none", "torchjd:CAGrad(c=0.4, norm_eps=0.1)"]
    assert search.parse_grid([f"surgery={','.join(methods)}"]) == {"surgery.method": methods}
    assert search.parse_grid(["optimizer.betas=[0.9, 0.98],[0.9,0.999]", "lr=1e-4,2e-4"]) == {
        "optimizer.betas": ["[0.9, 0.98]", "[0.9,0.999]"],
        "optimizer.lr": ["1e-4", "2e-4"],
    }


@pytest.mark.usefixtures("one_thread")
def test_a_search_shows_the_scores_of_tasks_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table had columns of the course's tasks, all empty."""
    monkeypatch.chdir(tmp_path)
    rows = "text,label\n" + "good,yes\nbad,no\n" * 20
    Path("rows.csv").write_text(rows, encoding="utf-8")
    recipe = 'name = "r"\ndescription = ""\n[tasks.verdict]\nkind = "classification"\ndata = "rows.csv"\n'
    Path("r.toml").write_text(recipe, encoding="utf-8")
    assert cli.run(search.main, ["--recipe", "r.toml", "--grid", "lr=1e-3", "--max-steps", "1", "--output", "out"]) == 0
    head = Path("out/table.md").read_text(encoding="utf-8").split("\n")[0]
    assert [name.strip() for name in head.strip("| ").split("|")] == [
        "optimizer.lr",
        "score",
        "verdict_accuracy",
        "steps",
    ]


@pytest.mark.usefixtures("one_thread")
def test_a_real_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_data(tmp_path / "data")
    flags = ["--data", str(data), "--range", "lr=1e-3..2e-3", "--optuna", "1"]
    assert cli.run(search.main, ["--output", str(tmp_path / "out"), "--max-steps", "1", *flags]) == 0
    (row,) = json.loads((tmp_path / "out" / "table.json").read_text())
    assert row["failure"] == ""
    assert row["dev"]["score"] > 0
    table = (tmp_path / "out" / "table.md").read_bytes()
    longer = ["--output", str(tmp_path / "out"), "--max-steps", "2", *flags[:-1], "2"]
    assert cli.run(search.main, longer) == 2
    assert "training.max_steps was 1, now 2; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "out" / "table.md").read_bytes() == table, "runs of two lengths in one ranking"
