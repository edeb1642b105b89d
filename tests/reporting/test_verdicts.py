# SPDX-License-Identifier: Apache-2.0
"""What a report answers first: verdicts on the tasks, and next steps whose commands work."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast import predict, train
from minbert_fast.common import cli
from minbert_fast.common.schema import Whole
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.reporting.comparison import write_comparison
from minbert_fast.reporting.next_steps import next_steps
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.runs import read_run
from minbert_fast.reporting.verdicts import announce, verdicts
from minbert_fast.tasks import build_tasks
from tests.small import small_data, small_run

CLASSES = ["different", "same"]


def of_classes(name: str, labels: list[int], predictions: list[int], **metrics: float | None) -> dict[str, Any]:
    """An entry of details.json with two classes."""
    pairs = list(zip(labels, predictions, strict=True))
    accuracy = sum(a == b for a, b in pairs) / len(pairs)
    return {
        "kind": "paraphrase", "primary": f"{name}_accuracy", "classes": CLASSES,
        "metrics": {f"{name}_accuracy": accuracy} | {f"{name}_{key}": value for key, value in metrics.items()},
        "ids": list(map(str, range(len(labels)))), "labels": labels, "predictions": predictions,
        "confusion": [[pairs.count((a, b)) for b in (0, 1)] for a in (0, 1)],
    }  # fmt: skip


def of_numbers(
    name: str, labels: list[float], predictions: list[Any], metric: str, value: float | None
) -> dict[str, Any]:
    """An entry of details.json without classes."""
    return {
        "kind": "similarity", "primary": f"{name}_{metric}", "classes": None, "metrics": {f"{name}_{metric}": value},
        "ids": list(map(str, range(len(labels)))), "labels": labels, "predictions": predictions,
    }  # fmt: skip


def write_run(
    directory: Path,
    tasks: dict[str, Any],
    untrained: dict[str, float],
    records: list[dict[str, Any]] | None = None,
    recipe: dict[str, Any] | None = None,
    **summary: Any,
) -> Path:
    """A run's directory whose dev scores are those of `tasks`."""
    (directory / "predictions").mkdir(parents=True)
    (directory / "best").mkdir()
    dev = {key: value for task in tasks.values() for key, value in task["metrics"].items()}
    values = {"dev": dev, "untrained": untrained, **summary}
    (directory / "summary.json").write_text(json.dumps(values))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records or ()))
    (directory / "predictions" / "details.json").write_text(json.dumps({"split": "dev", "tasks": tasks}))
    chosen = {"tasks": {name: {"kind": task["kind"]} for name, task in tasks.items()}} | (recipe or {})
    (directory / "best" / "recipe.toml").write_text(Recipe().with_values(chosen, "test").to_toml())
    return directory


def balanced(n: int, right: float) -> tuple[list[int], list[int]]:
    """n labels, half of each class, and predictions of which a share is right in each class."""
    labels = [0, 1] * (n // 2)
    wrong = set(range(round((1 - right) * n)))
    return labels, [1 - label if i in wrong else label for i, label in enumerate(labels)]


def test_a_task_is_judged_against_before_training_and_a_constant_answer(tmp_path):
    """`better` needs both, by more than two standard errors: sqrt(p (1 - p) / n) is 0.025 for an accuracy of 0.5."""
    tasks = {
        name: of_classes(name, *balanced(400, right)) for name, right in (("good", 0.8), ("even", 0.54), ("bad", 0.4))
    }
    before = {"good_accuracy": 0.5, "even_accuracy": 0.3, "bad_accuracy": 0.5}
    bad, even, good = verdicts(read_run(write_run(tmp_path / "run", tasks, before)))
    assert [(v.task, v.level) for v in (bad, even, good)] == [("bad", "worse"), ("even", "unclear"), ("good", "better")]
    assert good.error == pytest.approx(math.sqrt(0.8 * 0.2 / 400), rel=0.25)
    assert good.constant == 0.5
    assert even.text == "better than before training, not clearly better than always answering “different”"
    assert bad.text == "worse than before training and always answering “different”"
    assert good.line.startswith(
        "good: better than before training and always answering “different”: accuracy 0.800 ± 0.0"
    )
    assert good.line.endswith("(0.500 before training, 0.500 always answering “different”)")


def test_the_constant_class_is_that_of_the_training_labels(tmp_path):
    """A constant answer may not know the dev labels, of which class 1 is the more frequent one here."""
    task = of_classes("task", [0] * 40 + [1] * 60, [0] * 40 + [1] * 60)
    task["distribution"] = {
        "edges": None,
        "train": [90, 10],
        "train_rows": 100,
        "labels": [40, 60],
        "predictions": [40, 60],
    }
    (verdict,) = verdicts(read_run(write_run(tmp_path / "run", {"task": task}, {})))
    assert (verdict.constant, verdict.constant_name) == (0.4, "always answering “different”")
    del task["distribution"]
    (verdict,) = verdicts(read_run(write_run(tmp_path / "old", {"task": task}, {})))
    assert (verdict.constant, verdict.constant_name) == (0.6, "always answering “same”")


def test_a_head_that_answers_one_class_is_no_gain(tmp_path):
    """Regression: one class for 94 % of the pairs, with a higher accuracy and a lower macro-F1, was shown as a gain."""
    labels = [0] * 630 + [1] * 370
    task = of_classes("task", labels, [0] * 630 + [0] * 310 + [1] * 60, macro_f1=0.47)
    run = read_run(write_run(tmp_path / "run", {"task": task}, {"task_accuracy": 0.53, "task_macro_f1": 0.52}))
    (verdict,) = verdicts(run)
    assert verdict.level == "unclear"
    assert "it answers “different” for 94% of the rows (63% have that label)" in verdict.text
    assert "macro-F1 fell from 0.520 to 0.470" in verdict.text
    (advice,) = [a for a in next_steps(run) if "Weight the classes" in a.reason]
    assert "--set tasks.task.class_weights=balanced" in advice.command
    check_commands([advice.command])
    same = of_classes("task", labels, [0] * 940 + [1] * 60, macro_f1=1 / 3 - 1e-9)
    before = {"task_accuracy": 0.53, "task_macro_f1": 1 / 3}
    (verdict,) = verdicts(read_run(write_run(tmp_path / "same", {"task": same}, before)))
    assert "94%" in verdict.text
    assert "fell" not in verdict.text  # regression: "macro-F1 fell from 0.333 to 0.333"
    fair = of_classes("task", labels, [0] * 750 + [1] * 250, macro_f1=0.8)
    (verdict,) = verdicts(read_run(write_run(tmp_path / "fair", {"task": fair}, {"task_accuracy": 0.53})))
    assert verdict.level == "better"


def test_a_head_that_gives_far_too_many_labels_is_no_gain(tmp_path):
    """Five labels a row where one row in five has a label were "better than the most frequent labels"."""
    labels = np.zeros((400, 5), int)
    labels[::5, 0] = 1
    tags = {
        "kind": "multilabel", "primary": "tags_micro_f1", "classes": list("abcde"), "metrics": {"tags_micro_f1": 0.08},
        "labels": labels.tolist(), "predictions": np.ones_like(labels).tolist(),
    }  # fmt: skip
    run = read_run(write_run(tmp_path / "run", {"tags": tags}, {"tags_micro_f1": 0.0}))
    (verdict,) = verdicts(run)
    assert verdict.level == "unclear"
    assert verdict.text.endswith("but it gives 2,000 labels where there are 80")
    assert not any("Weight the classes" in advice.reason for advice in next_steps(run)), "that would give even more"


def test_a_score_that_falls_with_its_loss_is_no_matter_of_the_learning_rate(tmp_path):
    """Regression: of rare labels a head first gives none at all; a lower rate was advised, which would prolong that."""
    labels = np.zeros((100, 2), int)
    labels[:20, 0] = 1
    tags = {
        "kind": "multilabel", "primary": "tags_micro_f1", "classes": ["rare", "rarer"],
        "metrics": {"tags_micro_f1": 0.0, "tags_loss": 0.2}, "labels": labels.tolist(),
        "predictions": np.zeros_like(labels).tolist(),
    }  # fmt: skip
    chosen = {"tasks": {"tags": {"kind": "multilabel", "data": "tags.csv", "classes": ["rare", "rarer"]}}}
    before = {"tags_micro_f1": 0.15, "tags_loss": 0.7}
    run = read_run(write_run(tmp_path / "run", {"tags": tags}, before, recipe=chosen))
    (verdict,) = verdicts(run)
    assert (verdict.level, verdict.constant) == ("worse", 0.0)
    assert "and it gives 0 labels where there are 20" in verdict.text
    (advice,) = next_steps(run)
    assert "--set tasks.tags.class_weights=balanced" in advice.command
    check_commands([advice.command])
    before["tags_loss"] = 0.1
    for direction in (1, -1):  # of the learning rate: the run ended in its warm-up, or its last evaluation was the best
        records = [
            {"step": s, "epoch": s, "stage": 0, "lr": 1e-5 + direction * s * 1e-7, "dev/score": s} for s in (1, 2)
        ]
        run = write_run(tmp_path / f"hurt{direction}", {"tags": tags}, before, records, chosen, best={"step": 2})
        reasons = [advice.reason for advice in next_steps(read_run(run))]
        assert reasons == ["Training made it worse (tags): lower the learning rate."]


def test_a_diverged_run_is_said_first_and_in_red(tmp_path, monkeypatch, capsys):
    """Regression: a run with lr = 1e3 fell from 0.545 to 0.397 and ended without a word."""
    tasks = {
        "good": of_classes("good", *balanced(400, 0.9)),
        "nan": of_numbers("nan", [0.0, 1.0, 5.0], [None, None, None], "pearson", None),
        "lossless": of_classes("lossless", *balanced(400, 0.9), loss=None),
    }
    before = {"good_accuracy": 0.5, "nan_pearson": 0.1, "score": 0.545}
    directory = write_run(tmp_path / "run", tasks, before)
    summary = json.loads((directory / "summary.json").read_text())
    summary["dev"]["score"] = 0.397
    (directory / "summary.json").write_text(json.dumps(summary))
    lines = announce(directory).splitlines()
    assert lines[0] == "Overall score: worse than before training: 0.397 (0.545 before training)"
    assert [line.split(":")[0] for line in lines[1:]] == ["nan", "lossless", "good"]
    assert "diverged: not a number" in lines[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured = announce(directory).splitlines()
    assert [line[:5] for line in coloured] == ["\x1b[31m", "\x1b[31m", "\x1b[31m", "\x1b[32m"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert announce(directory).splitlines() == lines
    page = write_report(directory).read_text()
    assert page.index("banner worse") < page.index("tile worse") < page.index("tile better")
    (advice,) = [a for a in next_steps(read_run(directory)) if "worse" in a.reason]
    assert "--lr 2e-06" in advice.command
    summary["dev"]["score"] = None
    (directory / "summary.json").write_text(json.dumps(summary))
    assert "not a number (0.545 before training)" in announce(directory).splitlines()[0]
    summary["dev"]["score"] = 0.5449  # "worse: 0.545 (0.545 before training)"
    (directory / "summary.json").write_text(json.dumps(summary))
    assert announce(directory).splitlines() == lines[1:]


@pytest.mark.ci
def test_train_prints_the_verdicts(tmp_path, capsys, monkeypatch):
    """A run at lr = 1e3 ends with exit status 0, and its first result is that it got worse."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = small_run(small_data(tmp_path / "data"), tmp_path / "run", "--lr", "1e3", "--max-steps", "3")
    assert cli.run(train.main, flags) == 0
    before, _, after = capsys.readouterr().out.partition("Overall score: worse than before training: ")
    assert "all steps taken" not in before
    assert "all steps taken" in after
    assert after.splitlines()[1:4] == [v.line for v in verdicts(read_run(tmp_path / "run"))]
    task = read_run(tmp_path / "run").tasks["sentiment"]
    assert sum(task["distribution"]["train"]) == task["distribution"]["train_rows"] == 40


def test_tasks_of_other_kinds_have_verdicts(tmp_path):
    """An error counts downwards, a ranking has no constant answer, and several labels are matrices."""
    rng = np.random.default_rng(0)
    prices = rng.normal(size=200)
    near = prices + 0.3 * rng.normal(size=200)
    mae = float(np.abs(near - prices).mean())
    labels = (rng.random((200, 3)) < [0.2, 0.5, 0.6]).astype(int)
    tasks = {
        "price": of_numbers("price", prices.tolist(), near.tolist(), "mae", mae),
        "rank": of_numbers("rank", [], [1.0] * 50 + [2.0] * 50, "mrr", 0.75) | {"labels": None},
        "tags": {
            "kind": "multilabel", "primary": "tags_macro_f1", "classes": ["a", "b", "c"],
            "metrics": {"tags_macro_f1": 1.0}, "labels": labels.tolist(), "predictions": labels.tolist(),
        },
    }  # fmt: skip
    before = {"price_mae": 1.2, "rank_mrr": 0.3, "tags_macro_f1": 0.2}
    found = {
        v.task: v for v in verdicts(read_run(write_run(tmp_path / "run", tasks, before, {"tasks": {"sentiment": {}}})))
    }
    assert {v.level for v in found.values()} == {"better"}
    assert found["price"].constant == pytest.approx(np.abs(prices - prices.mean()).mean())
    assert found["rank"].constant is None
    assert found["rank"].error == pytest.approx(math.sqrt(0.75 * 0.25 / 100))
    assert found["tags"].constant_name == "the most frequent labels"
    (worse,) = verdicts(read_run(write_run(tmp_path / "worse", {"price": tasks["price"]}, {"price_mae": 0.1})))
    assert worse.level == "worse"


# ---- Next steps ------------------------------------------------------------------------------------------------------


def check_commands(commands: list[str]) -> None:
    """Each command is one that `train` or `predict` takes, with a recipe whose tasks can be built."""
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"]
        if words[2] == "minbert_fast.train":
            build_tasks(train.build_recipe(train.parser().parse_args(words[3:])))
        else:
            assert words[2] == "minbert_fast.predict"
            predict.parser().parse_args(words[3:])


def steps_of(
    path: Path, records: list[dict[str, Any]], recipe: dict[str, Any] | None = None, **summary: Any
) -> list[str]:
    """Reasons and commands of a run with a good task."""
    tasks = {"sentiment": of_classes("sentiment", *balanced(400, 0.9)) | {"kind": "sentiment"}}
    run = read_run(write_run(path, tasks, {"sentiment_accuracy": 0.5}, records, recipe, **summary))
    advice = next_steps(run)
    check_commands([a.command for a in advice if a.command])
    return [text for a in advice for text in a]


def evaluations(*losses: float) -> list[dict[str, Any]]:
    """Records of the untrained model and of one evaluation an epoch, ten steps each, with a falling learning rate."""
    return [{"step": 0, "epoch": 0.0, "stage": 0, "dev/sentiment_loss": 0.1, "dev/score": 0.5}] + [
        {"step": 10 * i, "epoch": float(i), "stage": 0, "lr": 1e-5 / i, "dev/sentiment_loss": loss, "dev/score": 0.5}
        for i, loss in enumerate(losses, start=1)
    ]


def test_next_steps_follow_from_the_records(tmp_path):
    rising = [{"step": step, "epoch": step / 500, "stage": 0, "lr": 4e-7 * step} for step in (1, 10, 20)]
    cut = steps_of(tmp_path / "a b", rising, {"training": {"max_steps": 20}})
    assert cut[0] == "The run ended while the learning rate was still warming up: take more steps."
    assert "--max-steps 500" in cut[1]  # 2e-5 / 4e-7 = 50 steps of warm-up, a tenth of all
    assert shlex.split(cut[1])[-1] == str(tmp_path / "a b-longer")
    stopped = steps_of(tmp_path / "stopped", rising, finished=False)
    assert stopped[1] == f"python -m minbert_fast.train --resume --output {tmp_path / 'stopped'}"

    last = steps_of(tmp_path / "last", evaluations(0.9, 0.8, 0.7), {"training": {"epochs": 3}}, best={"step": 30})
    assert last[0] == "The last evaluation was the best one: train longer."
    assert "--epochs 6" in last[1]
    over = steps_of(tmp_path / "over", evaluations(0.9, 0.6, 0.7), best={"step": 20})
    assert over[0] == "Dev losses have risen (sentiment since epoch 2): stop early."
    assert "--set training.patience=1" in over[1]
    rises = steps_of(tmp_path / "rises", evaluations(0.9, 0.6, 0.7), best={"step": 30})
    assert rises[0] == "Use the model:", "patience stops no run whose score still rises"
    fine = steps_of(tmp_path / "fine", evaluations(0.9, 0.7, 0.71), best={"step": 20})
    assert fine[0] == "Use the model:"
    once = steps_of(tmp_path / "once", evaluations(0.9), best={"step": 10})
    assert once[0] == "Use the model:", "a single evaluation is both the first and the last"
    limited = steps_of(tmp_path / "limited", evaluations(0.9, 0.8), {"training": {"max_steps": 20}}, best={"step": 20})
    assert "--max-steps 40" in limited[1]
    shown = steps_of(tmp_path / "demo", evaluations(0.9, 0.7, 0.7), best={"step": 20}, demonstration=True)
    assert shown[0].startswith("This was a demonstration")


def test_a_recipe_with_stages_gets_reasons_without_a_command_that_its_stages_would_override(tmp_path):
    recipe = {"stages": [{"training": {"epochs": 3}}]}
    found = steps_of(tmp_path / "staged", evaluations(0.9, 0.8), recipe, best={"step": 20})
    assert found == ["The last evaluation was the best one: train longer.", ""]


# ---- Surgery and comparisons ------------------------------------------------------------------------------------------


def two_runs(tmp_path: Path, names: tuple[str, str] = ("plain", "surgery"), **changes: Any) -> list[Path]:
    """A run without surgery and one with PCGrad, whose overall scores are 0.70 and 0.72."""
    directories = []
    for name, method, score in zip(names, ("none", "pcgrad"), (0.70, 0.72), strict=True):
        tasks = {"sentiment": of_classes("sentiment", *balanced(400, 0.9)) | {"kind": "sentiment"}}
        recipe = {"surgery": {"method": method}, **changes.get(method, {})}
        directory = write_run(tmp_path / name, tasks, {}, [], recipe)
        summary = json.loads((directory / "summary.json").read_text())
        summary["dev"]["score"] = score
        (directory / "summary.json").write_text(json.dumps(summary))
        directories.append(directory)
    return directories


def test_cosines_near_zero_are_noise_and_no_report_claims_that_surgery_helped(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        {"step": i, "stage": 0, "cosine/a|b": float(rng.uniform(-0.04, 0.04)), "conflicts": 1.0} for i in range(1, 40)
    ]
    task = {"sentiment": of_classes("sentiment", *balanced(400, 0.9)) | {"kind": "sentiment"}}
    run = write_run(tmp_path / "run", task, {}, records, {"surgery": {"method": "pcgrad"}})
    text = write_report(run).read_text()
    assert "In 0.0% of the 39 logged steps" in text
    assert "(noise)" in text
    assert "Whether it helped, only the same run without it can tell" in text
    (command,) = re.findall(r"python -m minbert_fast\.train [^<\n]*--surgery none[^<\n]*", text)
    check_commands([command])


def test_a_comparison_says_what_surgery_changed_if_nothing_else_differs(tmp_path):
    path = write_comparison(two_runs(tmp_path), tmp_path / "cmp.html")
    assert "pcgrad: +0.0200 overall score against the run without surgery. One run cannot tell" in path.read_text()
    more = two_runs(tmp_path, ("plain2", "surgery2"), none={"training": {"seed": 1}}, pcgrad={"training": {"seed": 1}})
    runs = [tmp_path / name for name in ("plain", "surgery")] + more
    assert "pcgrad: +0.0200 ± 0.0000 overall score" in write_comparison(runs, tmp_path / "cmp.html").read_text()
    other = two_runs(tmp_path, ("plain3", "surgery3"), pcgrad={"optimizer": {"lr": 1e-3}})
    assert "overall score against" not in write_comparison(other, tmp_path / "cmp.html").read_text()


def test_a_comparison_warns_of_different_dev_sets(tmp_path):
    first, second = two_runs(tmp_path)
    assert "dev sets differ" not in write_comparison([first, second], tmp_path / "cmp.html").read_text()
    details = second / "predictions" / "details.json"
    values = json.loads(details.read_text())
    task = values["tasks"]["sentiment"]
    for key in ("ids", "labels", "predictions"):
        task[key] = task[key][:399]
    details.write_text(json.dumps(values))
    text = write_comparison([first, second], tmp_path / "cmp.html").read_text()
    assert "sentiment: the runs" in text
    assert "(rows: 400 in plain; 399 in surgery)" in text
    assert "overall score against" not in text


def test_the_score_of_a_run_with_a_task_of_ones_own_is_not_called_the_courses(tmp_path):
    """The page gave the course's formula beside a mean over all tasks, and a comparison did not warn."""
    runs = []
    for name, tasks, score in (("course", ["sentiment"], 0.9), ("own", ["sentiment", "topic"], 0.7)):
        found = {t: of_classes(t, *balanced(400, accuracy)) for t, accuracy in zip(tasks, (0.9, 0.5), strict=False)}
        directory = write_run(tmp_path / name, found, {}, [], {})
        summary = json.loads((directory / "summary.json").read_text())
        summary["dev"]["score"] = score
        (directory / "summary.json").write_text(json.dumps(summary))
        runs.append(directory)
    course, own = (html.unescape(write_report(directory).read_text()) for directory in runs)
    assert "(sentiment accuracy) / 1" in course
    assert "The mean of the tasks' judging metrics" in own
    text = html.unescape(write_comparison(runs, tmp_path / "cmp.html").read_text())
    assert "do not compare (of sentiment accuracy in course; of sentiment accuracy, topic accuracy in own)" in text


def test_a_comparison_warns_of_overall_scores_of_different_tasks(tmp_path):
    """Two runs of other tasks: neither the page's warning nor its settings named the tasks, and it credited surgery."""
    both = {"tasks": Whole({"sentiment": {}, "paraphrase": {}})}
    first, second = two_runs(tmp_path, none={"tasks": Whole({"sentiment": {}})}, pcgrad=both)
    for key, path in (("dev", second / "summary.json"), ("tasks", second / "predictions" / "details.json")):
        values = json.loads(path.read_text())
        more = of_classes("paraphrase", *balanced(400, 0.8)) | {"kind": "paraphrase"}
        values[key]["paraphrase_accuracy" if key == "dev" else "paraphrase"] = 0.8 if key == "dev" else more
        path.write_text(json.dumps(values))
    text = html.unescape(write_comparison([first, second], tmp_path / "cmp.html").read_text())
    assert "overall scores do not compare (of sentiment accuracy in plain; of paraphrase accuracy, sentiment" in text
    assert "sentiment, paraphrase" in text.partition("<h2>Settings that differ")[2]
    assert "overall score against" not in text


def test_the_lowest_loss_of_a_comparison_is_bold(tmp_path):
    directories = two_runs(tmp_path)
    for directory, loss in zip(directories, (0.4, 0.6), strict=True):
        summary = json.loads((directory / "summary.json").read_text())
        summary["dev"]["sentiment_loss"] = loss
        (directory / "summary.json").write_text(json.dumps(summary))
    text = write_comparison(directories, tmp_path / "cmp.html").read_text()
    assert "<b>0.4000</b>" in text
    assert "<b>0.6000</b>" not in text
    assert "<b>0.7200</b>" in text


def test_a_score_of_one_row_has_no_standard_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"one": of_classes("one", [1], [1])}, {"one_accuracy": 1.0})
    assert "accuracy 1.000 (" in announce(run)
    assert "nan" not in announce(run)


def test_an_error_above_one_has_no_standard_error_of_a_share(tmp_path: Path) -> None:
    """Named after the bug: `rmse 6.700 ± 0.000` of a metric of one's own, and so always clearly better or worse."""
    task = of_numbers("price", [3.0, 9.0], [4.0, 5.0], "rmse", 6.7)
    run = write_run(tmp_path / "run", {"price": task}, {"price_rmse": 8.6})
    (verdict,) = verdicts(read_run(run))
    assert verdict.level == "unclear"
    assert verdict.line == "price: not clearly better than before training: rmse 6.700 (8.600 before training)"


def test_the_commands_of_a_run_in_a_directory_with_a_space_are_quoted(tmp_path: Path) -> None:
    records = [{"step": 1, "cosine/one|two": 0.5}]
    run = tmp_path / "a run"
    write_run(run, {"one": of_classes("one", [1], [1])}, {}, records, {"surgery": {"method": "pcgrad"}})
    page = write_report(run).read_text()
    first, second = re.findall(r"<pre>(.*\n.*minbert_fast\.report.*)</pre>", page)[0].split("\n")
    assert shlex.split(html.unescape(first))[-1] == f"{run}-no-surgery"
    assert shlex.split(html.unescape(second))[-2:] == [f"{run}-no-surgery", str(run)]


def test_charts_of_a_metric_of_one_class_stay_in_plots(tmp_path: Path) -> None:
    """Regression: `f1/../../x` wrote x.svg beside the report."""
    key = "one_f1/../../x"
    one = of_classes("one", [0, 1], [0, 1], **{"f1/../../x": 0.5}) | {"primary": key}
    records = [{"step": step, "epoch": step, f"dev/{key}": 0.5, f"train/{key}": 0.6} for step in (1, 2)]
    run = write_run(tmp_path / "run", {"one": one}, {}, records)
    write_report(run)
    assert not list(run.glob("*.svg"))
    assert (run / "plots" / "overfitting-one_f1_.._.._x.svg").is_file()
