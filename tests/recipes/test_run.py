# SPDX-License-Identifier: Apache-2.0
"""Every recipe and all its stages train for a few steps on sample data; the commands reproduce and search."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minbert_fast import compare, reproduce, search
from minbert_fast.common import cli
from minbert_fast.common.errors import InterruptError
from minbert_fast.common.schema import merge
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.reporting.published import COLUMNS
from minbert_fast.tasks import build_tasks
from minbert_fast.trainer import experiments
from minbert_fast.trainer.callbacks import Callback, StepEvent
from minbert_fast.trainer.completing import with_task_values, without_tasks
from minbert_fast.trainer.job import Options, train
from minbert_fast.trainer.outputs import lock_directory
from minbert_fast.trainer.resume import changed_values
from tests.small import error_line

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the sample data, with film reviews and triplets made from the same sentences."""
    folder = tmp_path_factory.mktemp("data")
    chance = random.Random(0)
    for path in sample_directory().data.glob("*.csv"):
        lines = path.read_text().splitlines()
        (folder / path.name).write_text("\n".join(lines[:33]) + "\n")
    sentences = [line.split("\t")[1] for line in (folder / "ids-sst-train.csv").read_text().splitlines()[1:]]
    for split in ("train", "dev"):
        rows = [f"{i}\t{sentence}\t{i % 2}" for i, sentence in enumerate(sentences)]
        (folder / f"ids-cfimdb-{split}.csv").write_text("\n".join(["id\tsentence\tsentiment", *rows]) + "\n")
        triplets = [",".join(f'"{chance.choice(sentences)}"' for _ in range(3)) for _ in range(24)]
        for name in ("snli", "multinli"):
            pairs = [
                {"sentence1": chance.choice(sentences), "sentence2": chance.choice(sentences), "gold_label": label}
                for label in ("entailment", "neutral", "contradiction", "-") * 6
            ]
            (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / f"nli-triplets-{split}.csv").write_text("\n".join(["sent0,sent1,hard_neg", *triplets]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains(name: str, data: Path, tmp_path: Path) -> None:
    quick: dict[str, Any] = {
        "data": {"directory": str(data)},
        "training": {"batch_size": 4, "evaluate_untrained": False, "precision": "fp32"},
    }
    recipe = Recipe.load(name).with_values(quick, "test")
    limit = {"training": {"max_steps": 2}}
    stages = tuple(merge(stage, limit) for stage in recipe.stages)
    recipe = replace(recipe, stages=stages) if stages else recipe.with_values(limit, "test")
    output = train(recipe, Options(tmp_path / "run", device="cpu"))
    summary = json.loads((output / "summary.json").read_text())
    assert summary["steps"] == 2 * max(1, len(stages))
    assert summary["skipped_steps"] == 0
    judged = {task.primary for task in build_tasks(recipe).values() if task.predicts and task.labelled}
    assert judged <= set(summary["dev"])
    assert set(summary.get("train", {})) == (set(summary["dev"]) if recipe.training.evaluate_train else set())
    assert (output / "best" / "heads.safetensors").is_file()


def run(main: Any, *arguments: object) -> int:
    return cli.run(main, [str(a) for a in arguments])


def rows_in(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["recipe"]: row for row in json.loads((folder / "results.json").read_text())}


def test_reproduce_accumulates_rows_and_continues(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished row never runs again, even if its directory is gone; the table holds the rows of all calls."""
    flags = ["--data", data, "--output", tmp_path, "--max-steps", 2, "--discard"]
    assert run(reproduce.main, "finetune-cosine", *flags[:-1]) == 0
    assert (tmp_path / "finetune-cosine" / "best").is_dir()
    assert run(reproduce.main, "siamese-similarity-m*", "finetune-cosine", *flags) == 0
    printed = capsys.readouterr().out
    assert "finetune-cosine: Similarity as the embeddings' cosine\nfinished before" in printed
    rows = rows_in(tmp_path)
    assert list(rows) == ["finetune-cosine", "siamese-similarity-mse"]
    row = rows["finetune-cosine"]
    assert row["published"]["dev"] == {
        "sentiment_accuracy": 0.209,
        "paraphrase_accuracy": 0.736,
        "similarity_pearson": 0.384,
    }
    assert row["published"]["seconds"] == 1782
    assert row["measured"]["dev"].keys() == row["measured"]["train"].keys()
    assert (row["steps"], row["epochs"], row["epochs_scale"], row["max_steps"]) == (2, [1.0], 1.0, 2)
    assert row["dev_rows"] == dict.fromkeys(("sentiment", "paraphrase", "similarity"), 32)
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    (line,) = (line for line in table.splitlines() if line.startswith("| finetune-cosine"))
    for split, published in (("dev", "0.736"), ("train", "0.689")):
        assert f"{published} / {row['measured'][split]['paraphrase_accuracy']:.3f}" in line
    (line,) = (line for line in table.splitlines() if line.startswith("| siamese-similarity-mse"))
    assert f"0.620 / {rows['siamese-similarity-mse']['measured']['dev']['similarity_pearson']:.3f}" in line
    assert line.split("|")[2].strip() == "", "similarity alone has no sentiment score"

    left = {path.name for path in (tmp_path / "finetune-cosine").iterdir()}
    assert {"summary.json", "metrics.jsonl", "report.html", "predictions"} <= left
    assert not {"best", "last"} & left
    assert [path.name for path in (tmp_path / "finetune-cosine" / "checkpoints").iterdir()] == ["recipe.toml"]
    shutil.rmtree(tmp_path / "finetune-cosine")
    assert run(reproduce.main, "finetune-cosine", *flags) == 0
    assert not (tmp_path / "finetune-cosine").exists()


def test_an_interrupted_reproduction_has_a_table_of_what_ran(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """table.md came with the last of 34 rows."""
    run_or_resume = experiments.run_or_resume

    def interrupted(name: str, *arguments: Any) -> experiments.Trial:
        if name == "siamese-similarity-mse":
            raise InterruptError(15, "stopped")
        return run_or_resume(name, *arguments)

    monkeypatch.setattr(experiments, "run_or_resume", interrupted)
    flags = ["--data", data, "--output", tmp_path, "--max-steps", 1]
    assert run(reproduce.main, "siamese-paraphrase-product", "siamese-similarity-mse", *flags) == 128 + 15
    assert "| siamese-paraphrase-product | " in (tmp_path / "table.md").read_text()


def test_an_interrupted_series_names_its_own_command(data: Path, tmp_path: Path) -> None:
    """It advised `train --resume` for one of its runs."""

    class Terminate(Callback):
        def on_step(self, event: StepEvent) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = Recipe.load("demonstration").with_values({"data": {"directory": str(data)}}, "test")
    with pytest.raises(InterruptError, match=r"after step 1, which is saved; to continue: search --grid lr=1$"):
        experiments.run_or_resume("lr=1", recipe, tmp_path / "run", "search --grid lr=1", callbacks=[Terminate()])


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (search.main, ["--grid", "lr=1e-3"]),
        (compare.main, ["--methods", "none", "--seeds", 1]),
        (reproduce.main, ["siamese-similarity-mse"]),
    ],
)
def test_two_series_in_one_directory(
    main: Any, flags: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one took the first one's runs for failures, and each replaced the other's table."""
    with lock_directory(tmp_path):
        assert run(main, *flags, "--output", tmp_path, "--max-steps", 0) == 1
    assert "another run is writing here" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_scaled_epochs_are_stated_in_the_table(data: Path, tmp_path: Path) -> None:
    assert run(reproduce.main, "finetune-cosine", "--epochs-scale", 0.5, "--data", data, "--output", tmp_path) == 0
    row = rows_in(tmp_path)["finetune-cosine"]
    assert row["steps"] == 2  # half of the four batches of 8 that 32 pairs fill
    assert (row["epochs"], row["epochs_scale"]) == ([0.5], 0.5)
    assert "Epochs are 0.5 times the reports' (--epochs-scale)." in (tmp_path / "table.md").read_text()


def test_a_row_of_tasks_trained_one_by_one_has_each_tasks_own_best_scores(data: Path, tmp_path: Path) -> None:
    flags = ["--data", data, "--output", tmp_path, "--max-steps", 12]
    assert run(reproduce.main, "enhancing-final", *flags) == 0
    row = rows_in(tmp_path)["enhancing-final"]
    assert row["max_steps"] == row["steps"] == 12, "of the run, which its stages share"
    summary = json.loads((tmp_path / "enhancing-final" / "summary.json").read_text())
    steps = {}
    for task in ("sentiment", "paraphrase", "similarity"):
        kept = summary["best_per_task"][task]
        steps[task] = kept["step"]
        (metric,) = (m for m in kept["metrics"] if m in reproduction_metrics(task))
        assert row["measured"]["dev"][metric] == kept["metrics"][metric] == kept["score"]
        assert (tmp_path / "enhancing-final" / f"best-{task}" / "heads.safetensors").is_file()
    within = steps["sentiment"] <= 6 < steps["paraphrase"] <= 9 < steps["similarity"]
    assert within, "a stage counts for the task that it trains"
    assert (
        "Each task's own best model (one by one, as the report trained them): enhancing-final."
        in (tmp_path / "table.md").read_text()
    )


def reproduction_metrics(task: str) -> tuple[str, ...]:
    return tuple(metric for metric in COLUMNS[task] if metric.startswith(task))


def test_a_row_of_another_experiment_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another length or seed is another run: it needs another --output, and leaves the finished row alone."""
    flags = ["siamese-paraphrase-product", "--data", data, "--output", tmp_path]
    assert run(reproduce.main, *flags, "--max-steps", 1) == 0
    before = rows_in(tmp_path)
    assert before["siamese-paraphrase-product"]["steps"] == 1
    capsys.readouterr()
    for change, reason in (
        (("--max-steps", 2), "training.max_steps was 1, now 2; choose another --output"),
        (("--max-steps", 1, "--seed", 3), "training.seed"),
        (("--max-steps", 1, "--seed", 3, "--discard"), "training.seed"),
        (("--max-steps", 1, "--discard"), ""),
        (("--max-steps", 1, "--seed", 3), "training.seed"),  # also of a run whose model is gone
    ):
        assert run(reproduce.main, *flags, *change) == (1 if reason else 0)
        assert reason in capsys.readouterr().err
        assert rows_in(tmp_path) == before


def test_the_table_names_weights_data_and_device(data: Path, tmp_path: Path) -> None:
    without = tmp_path / "data"
    shutil.copytree(data, without, ignore=shutil.ignore_patterns("nli-*", "cache"))
    model = sample_directory().model
    flags = ["--data", without, "--model", model, "--output", tmp_path / "runs", "--max-steps", 1]
    assert run(reproduce.main, "bertology-nli-triplet", *flags) == 0
    text = (tmp_path / "runs" / "table.md").read_text()
    config = json.loads((model / "config.json").read_text())
    assert f"{config['num_hidden_layers']} layers of {config['hidden_size']}" in text
    assert "quora-train.csv 32" in text
    assert "bertology-nli-triplet ran without nli: no data." in text
    assert "Run on cpu" in text
    assert rows_in(tmp_path / "runs")["bertology-nli-triplet"]["without"] == ["nli"]


def test_a_failed_recipe_does_not_stop_the_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lonely = tmp_path / "data"
    lonely.mkdir()
    for split in ("train", "dev"):
        shutil.copy(data / f"ids-cfimdb-{split}.csv", lonely)
    flags = ["--data", lonely, "--output", tmp_path / "runs", "--max-steps", 1]
    assert run(reproduce.main, "finetune-cosine", "sbert-cfimdb-frozen", *flags) == 1
    error = capsys.readouterr().err
    assert "1 of 2 recipes did not run: finetune-cosine" in error
    rows = rows_in(tmp_path / "runs")
    assert "no training file" in rows["finetune-cosine"]["failure"] or "no data" in rows["finetune-cosine"]["failure"]
    assert rows["sbert-cfimdb-frozen"]["steps"] == 1
    assert "| sbert-cfimdb-frozen | 0.780 / " in (tmp_path / "runs" / "table.md").read_text()


def test_search_ranks_every_combination_and_continues(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--grid", "lr=1e-3,2e-3", "--grid", "surgery=none,pcgrad"]
    flags = ["--data", data, "--output", tmp_path, "--max-steps", 1, *grid]
    assert run(search.main, *flags) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert len(rows) == 4
    scores = [row["dev"]["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert {(row["values"]["optimizer.lr"], row["values"]["surgery.method"]) for row in rows} == {
        (lr, method) for lr in ("1e-3", "2e-3") for method in ("none", "pcgrad")
    }
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "search-optimizer.lr.svg", "search-surgery.method.svg"
    }  # fmt: skip
    recipe = Recipe.load(str(tmp_path / "lr=2e-3,method=pcgrad" / "best" / "recipe.toml"))
    assert (recipe.optimizer.lr, recipe.surgery.method) == (2e-3, "pcgrad")

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    capsys.readouterr()
    assert run(search.main, *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")} == times
    assert "| 1e-3" in capsys.readouterr().out

    # Stopped after it had written its scores, a run counted as finished: it never got its report.
    stopped = tmp_path / "lr=1e-3,method=none"
    (stopped / "report.html").unlink()
    assert run(search.main, *flags) == 0
    assert (stopped / "report.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")} == times

    table = (tmp_path / "table.md").read_bytes()
    assert run(search.main, *flags, "--max-steps", 2) == 2
    assert "training.max_steps was 1, now 2; choose another --output" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_bytes() == table, "its scores gave way to four failures"

    assert run(search.main, *flags, "--metric", "beauty") == 2
    assert "--metric beauty: no such dev metric; known: sentiment_accuracy, " in capsys.readouterr().err


def test_a_metric_that_no_task_has_ends_the_first_run_before_its_first_step(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trained the whole first run before it said so."""
    flags = ["--grid", "lr=1e-3,2e-3", "--data", data, "--output", tmp_path, "--max-steps", 2]
    assert run(search.main, *flags, "--metric", "beauty") == 2
    assert "--metric beauty: no such dev metric; known: " in capsys.readouterr().err
    (summary,) = tmp_path.glob("*/summary.json")
    assert json.loads(summary.read_text())["steps"] == 0


def test_a_random_search_draws_different_combinations() -> None:
    grid = search.parse_grid(["lr=1,2,3", "dropout=0.1,0.2,0.3"])
    chosen = search.sample_combinations(search.combinations(grid), 4, seed=3)
    assert len({tuple(c.items()) for c in chosen}) == 4
    assert chosen == search.sample_combinations(search.combinations(grid), 4, seed=3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--grid", "lr"], "expected KEY=A,B"),
        (["--grid", "lr="], "expected KEY=A,B"),
        (["--grid", "nothing=1,2"], "expected KEY=A,B"),
        (["--grid", "optimizer.nothing=1,2"], "nothing"),
        (["--grid", "lr=1e-3,fast"], "lr"),
        (["--grid", "lr=1e-3", "--random", "-1"], "--random"),
        (["--grid", "lr=1e-3", "--random", "1", "--optuna", "1"], "--optuna"),
    ],
)
def test_mistakes_give_a_one_line_error_before_any_run(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(search.main, *arguments, "--output", tmp_path / "out") == 2
    assert expected in error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_optuna_proposes_within_the_grid(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="Optuna is not installed")
    flags = ["--data", data, "--output", tmp_path, "--max-steps", 1, "--grid", "lr=1e-3,2e-3"]
    assert run(search.main, *flags, "--optuna", 2) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["values"]["optimizer.lr"] for row in rows} <= {"1e-3", "2e-3"}


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"lr": 3e-5}},
        {"surgery": {"method": "upgrad"}},
        {"weighting": {"method": "uncertainty"}},
        {"regularisation": {"r_drop": 0.5}},
        {"training": {"ema": 0.99}},
        {"tasks": {"paraphrase": {"encoder": "both"}}},
        {"data": {"max_length": 64}},  # passed for the run with 128
    ],
)
def test_other_recipes_are_other_experiments(change: dict[str, Any]) -> None:
    recipe = Recipe.load("default")
    assert not changed_values(recipe, recipe.with_values({}, "test"), positions=512)
    assert changed_values(recipe, recipe.with_values(change, "test"), positions=512)


def test_a_stage_with_other_values_is_another_experiment() -> None:
    """The finished run of a recipe whose stage was changed afterwards passed for one of the new recipe."""
    first, other = (
        Recipe.load("default").with_values({"stages": [{"optimizer": {"lr": lr}}, {}]}, "test") for lr in (1e-3, 2e-3)
    )
    assert not changed_values(first, first, positions=512)
    assert changed_values(first, other, positions=512)


def test_a_maximum_length_above_the_models_is_no_other_experiment() -> None:
    long = Recipe.load("default").with_values({"data": {"max_length": 1024}}, "test")
    executed = long.with_values({"data": {"max_length": 512}}, "test")  # a run cuts it to the model's positions
    assert not changed_values(executed, long, positions=512)
    assert changed_values(executed, long, positions=1024)


def test_values_that_the_data_decide_make_no_other_experiment() -> None:
    """A comparison with a task whose kind the labels decide refused its own finished runs."""
    mood = {"data": {"train": "mood.csv", "text": ["text"], "label": "mood"}}
    recipe = Recipe.load("default").with_values({"tasks": {"mood": mood}}, "test")
    executed = with_task_values(recipe, "mood", {"kind": "classification", "classes": ["bad", "good"]})
    assert not changed_values(executed, recipe, positions=512)
    assert not changed_values(without_tasks(executed, ["sentiment"], print), recipe, positions=512)
    assert changed_values(executed, recipe.with_values({"tasks": {"mood": {"weight": 2.0}}}, "test"), positions=512)
