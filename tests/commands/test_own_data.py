# SPDX-License-Identifier: Apache-2.0
"""Tasks from one's own data: from the shell, from Python with rows in memory, and a mixture of five kinds on real data."""

from __future__ import annotations

import csv
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast import Predictor, Recipe, evaluate, export, fit, predict, report, train
from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError, Whole
from minbert_fast.data import sample_directory
from minbert_fast.data.messages import DataError
from minbert_fast.trainer.callbacks import Callback, EndEvent, EvaluationEvent, StepEvent

pytestmark = pytest.mark.usefixtures("one_thread")

VERDICTS = [("cold soup", "bad"), ("plain, fine tea", "fair"), ('a wonderful cake,\n"really"', "great")]
QUICK = {"training": {"max_steps": 2, "batch_size": 4, "precision": "fp32"}, "logging": {"every": 1}}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows(count: int = 45) -> list[dict[str, str]]:
    return [{"review": text, "verdict": verdict} for text, verdict in (VERDICTS * count)[:count]]


def write_csv(path: Path, table: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def run(module: Any, *arguments: str | Path) -> None:
    assert cli.run(module.main, [str(argument) for argument in arguments]) == 0, arguments


def test_one_line_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_csv(tmp_path / "reviews.csv", rows())
    flags = ("--model", sample_directory().model, "--max-steps", "2", "--device", "cpu")
    run(train, "--data", data, "--text", "review", "--label", "verdict", "--output", "runs/reviews", *flags)
    said = capsys.readouterr().out
    assert 'tasks.verdict: kind = "classification"' in said
    assert "no dev rows for verdict: 4 of 45 training rows are held out" in said or "5 of 45" in said
    model = Predictor.from_pretrained("runs/reviews/best", device="cpu", precision="fp32")
    assert model.tasks["verdict"].class_names == ("bad", "fair", "great")
    run(
        predict, "--checkpoint", "runs/reviews/best", "--task", "verdict", "--input", data, "--text", "review",
        "--output", "out.jsonl", "--probabilities", "--device", "cpu", "--precision", "fp32",
    )  # fmt: skip
    lines = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 45
    found = model.predict("verdict", [row["review"] for row in rows()])
    names = ("bad", "fair", "great")
    assert [line["prediction"] for line in lines] == [names[int(value)] for value in found.values]
    assert found.probabilities is not None
    shares = np.array([[line["probabilities"][name] for name in names] for line in lines])
    np.testing.assert_allclose(shares, found.probabilities, atol=2e-6)


class Log(Callback):
    def __init__(self, stop_at: int = 10**6) -> None:
        self.events: list[tuple[str, int]] = []
        self.stop_at = stop_at

    def on_step(self, event: StepEvent) -> bool:
        assert set(event.losses) == {"verdict"}
        assert np.isfinite(event.grad_norm)
        assert event.lr is not None
        self.events.append(("step", event.step))
        return event.step >= self.stop_at

    def on_evaluation(self, event: EvaluationEvent) -> None:
        assert "verdict_accuracy" in event.metrics
        self.events.append(("evaluation", event.step))

    def on_end(self, event: EndEvent) -> None:
        assert (event.output / "report.html").is_file()
        self.events.append((event.reason, event.steps))


def test_fit_on_rows_in_memory_with_callbacks(tmp_path: Path) -> None:
    log = Log()
    result = fit(QUICK, data=rows(), text="review", label="verdict", output=tmp_path / "run", callbacks=[log])
    assert log.events == [
        ("evaluation", 0), ("step", 1), ("step", 2), ("evaluation", 2), ("all steps taken", 2)
    ]  # fmt: skip
    assert set(result.metrics) >= {"verdict_accuracy", "verdict_macro_f1", "score"}
    assert result.summary["steps"] == 2
    assert "verdict_accuracy" in repr(result)
    assert len(result.predictor.predict("verdict", ["good", "bad"]).values) == 2
    recipe = Recipe.load(str(tmp_path / "run" / "best" / "recipe.toml"))
    assert tuple(recipe.tasks["verdict"]["classes"]) == ("bad", "fair", "great")


def test_a_callback_ends_a_run_which_then_resumes(tmp_path: Path) -> None:
    values = {**QUICK, "training": {**QUICK["training"], "max_steps": 3}}
    arguments: dict[str, Any] = {"data": rows(), "text": "review", "label": "verdict"}
    log = Log(stop_at=1)
    fit(values, **arguments, output=tmp_path / "stopped", callbacks=[log])
    assert log.events[-1] == ("stopped by a callback after step 1 of 3: --resume continues", 1)
    whole = fit(values, **arguments, output=tmp_path / "whole")
    resumed = fit(values, **arguments, output=tmp_path / "stopped", resume=True)
    assert resumed.summary["steps"] == 3
    weights = [(run.output / "last" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_memory_and_files_give_the_same_run(tmp_path: Path) -> None:
    pd, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    path = write_csv(tmp_path / "reviews.csv", rows())
    runs = [
        fit(QUICK, data=data, text="review", label="verdict", output=tmp_path / f"run{i}")
        for i, data in enumerate((path, rows(), pd.DataFrame(rows()), arrow.Table.from_pylist(rows())))
    ]
    weights = {(run.output / "last" / "model.safetensors").read_bytes() for run in runs}
    assert len(weights) == 1


def test_the_label_names_the_task_and_the_last_value_of_a_tuple(tmp_path: Path) -> None:
    tuples = [tuple(row.values()) for row in rows()]
    result = fit(QUICK, data=tuples, text="review", label="my verdict (1)", output=tmp_path / "run")
    assert "my-verdict-1_accuracy" in result.metrics


def test_a_stage_that_needs_another_head_is_refused_before_the_first_step(tmp_path: Path) -> None:
    stages = [{"tasks": {"verdict": {}}}, {"tasks": {"verdict": {"loss": "ordinal"}}}]
    with pytest.raises(ConfigError, match=r"tasks\.verdict: a stage cannot change the parameters of a head"):
        fit({**QUICK, "stages": stages}, data=rows(), text="review", label="verdict", output=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_says_which_tasks_its_score_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Film reviews beside the course's tasks do not count; with a task of the user's own every task does."""
    reviews = {"kind": "polarity", "data": {"layout": "sentiment", "values": {"2": "1", "3": "1", "4": "1"}}}
    tasks = {"tasks": Whole({"sentiment": {}, "reviews": reviews})}
    recipe = Recipe.load("demonstration").with_values({**tasks, "training": {"max_steps": 1}}, "test")
    course = fit(recipe, output=tmp_path / "run")
    line = "score is the course's, of sentiment alone: reviews does not count (training.select = 'score')"
    assert line in course.summary["notices"]
    assert course.metrics["score"] == course.metrics["sentiment_accuracy"]
    capsys.readouterr()
    table = {"train": rows(), "dev": rows(9), "text": "review", "label": "verdict", "kind": "classification"}
    result = fit(QUICK, data={"sentiment": table, "topic": table}, output=tmp_path / "other")
    assert "score is the course's" not in capsys.readouterr().out
    assert result.metrics["score"] == (result.metrics["sentiment_accuracy"] + result.metrics["topic_accuracy"]) / 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {
                "recipe": {**QUICK, "optimizer": {"eps": 0}},
                "data": rows(),
                "text": "review",
                "label": "verdict",
            },
            "eps = 0.0: expected a number above 0",
        ),
        (  # the classes were the texts of the sets, in an order that differed from process to process
            {"data": [{"t": "a", "y": {"b", "c"}}] * 40, "text": "t", "label": "y"},
            "train-rows:1: label is {'",
        ),
        (
            {"data": [{"t": "a", "y": {"id": 1}}] * 40, "text": "t", "label": "y"},
            "label is {'id': 1}, expected a name, a number or a list of names",
        ),
        ({"data": rows(), "text": "body", "label": "verdict"}, "body"),
        ({"data": "nowhere"}, "nowhere"),
        ({"text": "review"}, "give the rows"),
        ({"data": rows()}, "mapping"),
        ({"data": rows(), "text": "review", "label": "verdict", "kind": "regression"}, "label"),
        (
            {"data": rows(), "text": "review", "label": "verdict", "kind": "contrastive"},
            "tasks.verdict: label = 'verdict': contrastive reads no labels; expected data without label",
        ),
        ({"data": {"verdict": rows()}}, "no text columns"),
        (
            {"data": [{"t": "a", "y": 0}], "text": "t", "label": "y", "backend": "fst"},
            "backend 'fst': expected auto, fast",
        ),
        ({"data": __file__}, "(" + __file__ + ": a file)"),
    ],
)
def test_mistakes_are_one_line(arguments: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError)) as raised:
        fit(**{"recipe": QUICK, **arguments}, output=tmp_path / "run")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.ci
@pytest.mark.skipif(
    "MINBERT_FAST_DATA" not in os.environ, reason="no MINBERT_FAST_DATA, a directory of real course data"
)
def test_a_mixture_of_five_kinds_on_real_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Course data saved as CSV, JSON lines and Parquet with other columns: train, interrupt, resume, predict, export."""
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    course = Path(os.environ["MINBERT_FAST_DATA"])

    def table(name: str, split: str, separator: str = "\t") -> Any:
        return pd.read_csv(course / f"{name}-{split}.csv", sep=separator, nrows=60, on_bad_lines="skip").dropna()

    for split in ("train", "dev"):
        sst = table("ids-sst", split)
        names = ["awful", "poor", "fair", "good", "great"]
        pd.DataFrame({"mood": [names[i] for i in sst["sentiment"]], "text, quoted": sst["sentence"]}).to_csv(
            tmp_path / f"moods-{split}.csv", index=False
        )
        pd.DataFrame({"review": sst["sentence"], "stars": sst["sentiment"] + 1.0}).to_parquet(
            tmp_path / f"stars-{split}.parquet"
        )
        quora = table("quora", split)
        lines = [{"q": {"one": a, "two": b}, "same": bool(y)} for a, b, y in
                 zip(quora["sentence1"], quora["sentence2"], quora["is_duplicate"], strict=True)]  # fmt: skip
        (tmp_path / f"same-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sts = table("sts", split)
        pd.DataFrame({"a": sts["sentence1"], "b": sts["sentence2"], "grade": sts["similarity"]}).to_parquet(
            tmp_path / f"alike-{split}.parquet"
        )
    table("nli-triplets", "train", ",").to_csv(tmp_path / "triples.csv", index=False)
    (tmp_path / "mixture.toml").write_text(
        """
name = "mixture"
description = "Five kinds."
[tasks.mood]
kind = "classification"
data = { train = "moods-train.csv", dev = "moods-dev.csv", text = "text, quoted", label = "mood" }
[tasks.stars]
kind = "regression"
data = { train = "stars-train.parquet", dev = "stars-dev.parquet", text = "review", label = "stars" }
[tasks.same]
kind = "pair-classification"
data = { train = "same-train.jsonl", dev = "same-dev.jsonl", text = ["q.one", "q.two"], label = "same" }
[tasks.alike]
kind = "pair-regression"
data = { train = "alike-train.parquet", dev = "alike-dev.parquet", text = ["a", "b"], label = "grade" }
[tasks.answers]
kind = "ranking"
data = { train = "triples.csv", text = ["sent0", "sent1", "hard_neg"] }
[surgery]
method = "pcgrad"
[training]
max_steps = 2
batch_size = 8
precision = "fp32"
[logging]
every = 1
"""
    )
    flags = ("--recipe", "mixture.toml", "--model", sample_directory().model, "--device", "cpu")
    run(train, *flags, "--output", "whole")
    run(train, *flags, "--output", "parts", "--stop-after", "1")
    run(train, "--resume", "--output", "parts")
    whole, parts = (Path(name, "last", "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    summary = json.loads(Path("whole/summary.json").read_text())
    primary = {"mood_accuracy", "stars_pearson", "same_accuracy", "alike_pearson"}
    assert primary <= set(summary["dev"])
    assert any(name.startswith("answers_") for name in summary["dev"])
    capsys.readouterr()
    inputs = {
        "mood": "moods-dev.csv",
        "stars": "stars-dev.parquet",
        "same": "same-dev.jsonl",
        "alike": "alike-dev.parquet",
    }
    columns = {"mood": "text, quoted", "stars": "review", "same": "q.one,q.two", "alike": "a,b"}
    for task, file in inputs.items():
        if task == "mood":
            continue  # a column with a comma in its name is for recipes
        run(
            predict, "--checkpoint", "whole/best", "--task", task, "--input", file, "--text", columns[task],
            "--output", f"{task}.csv", "--format", "csv", "--device", "cpu",
        )  # fmt: skip
        with open(f"{task}.csv", newline="", encoding="utf-8") as out:
            assert len(list(csv.DictReader(out))) > 30
    run(export, "--checkpoint", "whole/best", "--format", "sentence-transformers", "--output", "exported")
    assert Path("exported/modules.json").is_file()
    run(report, "whole")
    page = Path("whole/report.html").read_text(encoding="utf-8")
    for word in ("awful", "mood", "stars", "alike", "answers"):
        assert word in page
    evaluated = ("--checkpoint", "whole/best", "--json", "scores.json", "--device", "cpu")
    run(evaluate, *evaluated)
    scores = json.loads(Path("scores.json").read_text())
    assert scores


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize("library", ["minbert_fast", "transformers", "sentence_transformers"])
def test_the_same_job_in_three_libraries(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The programs whose lines the README counts do run, on the data that they name."""
    pytest.importorskip(library)
    if library == "sentence_transformers":
        pytest.importorskip("datasets")
    write_csv(tmp_path / "reviews.csv", rows(30))
    pairs = [("a dog runs", "the dog is running", 4.5), ("a dog runs", "bread is cheap", 0.0), ("tea", "warm tea", 3.0)]
    write_csv(tmp_path / "alike.csv", [{"first": a, "second": b, "grade": g} for a, b, g in pairs * 10])
    program = Path(__file__).parents[2] / "docs" / "examples" / "same_job" / f"with_{library}.py"
    monkeypatch.setattr(sys, "argv", [str(program), str(sample_directory().model), "out"])
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.strip()
