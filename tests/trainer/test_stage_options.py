# SPDX-License-Identifier: Apache-2.0
"""What a stage may set: options of its tasks, which its models keep, and no value that concerns the whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minbert_fast import evaluate, fit, train
from minbert_fast.common.schema import ConfigError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel
from tests.small import read_records, small_data, small_run

STAGED = """
name = "staged"
description = "The second stage reads the paraphrase head's score in another way."

[tasks.paraphrase]
loss = "bce"
[tasks.similarity]

[[stages]]
tasks.paraphrase = {}
training.max_steps = 1
[[stages]]
tasks.paraphrase = { loss = "mse", threshold = 0.4, pooling = "cls" }
training.max_steps = 1
[[stages]]
tasks.similarity = {}
training.max_steps = 2
"""


def dev_scores(output: Path) -> dict[int, dict[str, float]]:
    """The dev scores of a run by step."""
    records = read_records(output)
    scored = {r["step"]: {k.removeprefix("dev/"): v for k, v in r.items() if k.startswith("dev/")} for r in records}
    return {step: scores for step, scores in scored.items() if scores}


def test_a_saved_model_reads_scores_as_the_last_stage_that_trained_the_task(tmp_path: Path) -> None:
    recipe = tmp_path / "staged.toml"
    recipe.write_text(STAGED, encoding="utf-8")
    data, whole, parts = small_data(tmp_path / "data"), tmp_path / "whole", tmp_path / "parts"
    flags = ["--recipe", str(recipe), "--set", "training.evaluate_every=1"]
    train.main(small_run(data, whole, *flags))
    evaluate.main(["--checkpoint", str(whole / "last"), "--precision", "fp32", "--json", str(tmp_path / "scores.json")])
    scores = dev_scores(whole)
    assert json.loads((tmp_path / "scores.json").read_text()) == pytest.approx(scores[4], abs=1e-5)
    assert MultitaskModel.load(whole / "last").tasks["paraphrase"].options.loss == "mse"
    train.main(small_run(data, parts, *flags, "--stop-after", "3"))
    train.main(small_run(data, parts, *flags, "--resume"))  # in the third stage, which does not train paraphrase
    assert dev_scores(parts) == scores


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('model.pooling = "cls"', r"stages\[0\].model.pooling = 'cls': a run has it once; set it in \[model\]"),
        ("logging.every = 3", r"stages\[0\].logging.every = 3: a run has it once; set it in \[logging\]"),
        ('tasks.sentiment.metric = "macro_f1"', r"tasks.sentiment.metric = 'macro_f1': .* in \[tasks.sentiment\]"),
    ],
)
def test_a_stage_cannot_set_a_value_of_the_run(value: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "staged.toml"
    recipe.write_text(f'name = "staged"\ndescription = "-"\n[[stages]]\n{value}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        train.main(small_run(small_data(tmp_path / "data"), tmp_path / "run", "--recipe", str(recipe)))


def test_a_stage_cannot_set_where_a_learned_scale_starts(tmp_path: Path) -> None:
    """It was ignored. A scale that is not learned may change."""

    def run(calibrated: bool) -> Path:
        task = {"head": "cosine", "calibrated": calibrated, "scale": 2.0}
        stages = [{}, {"tasks": {"similarity": {"scale": 5.0}}}]
        values = {"tasks": {"similarity": task}, "stages": stages, "training": {"max_steps": 2, "batch_size": 4}}
        recipe = Recipe.load("demonstration").with_values(values, "test")
        return fit(recipe, data=small_data(tmp_path / "data"), output=tmp_path / f"run-{calibrated}").output

    assert MultitaskModel.load(run(calibrated=False) / "last").head("similarity").options.scale == 5.0
    with pytest.raises(ConfigError, match=r"stages\[1\].tasks.similarity.scale = 5.0: .* in \[tasks.similarity\]$"):
        run(calibrated=True)


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_a_stage_balances_the_classes_by_itself(kind: str, tmp_path: Path) -> None:
    """`class_weights = "balanced"` in a stage alone had no effect: the classes were counted for the recipe's own options."""
    rows = [{"text": f"word {i}", "label": "rare" if i % 4 == 0 else "common"} for i in range(40)]
    stages = [{"tasks": {"topic": {}}}, {"tasks": {"topic": {"class_weights": "balanced"}}}]
    values = {"stages": stages, "data": {"holdout": 0.0}, "training": {"max_steps": 2}}
    data = {"topic": {"train": rows, "text": "text", "label": "label", "kind": kind}}
    output = fit(values, data=data, output=tmp_path / "run").output
    head = MultitaskModel.load(output / "last").head("topic")
    expected = {"classification": {"rare": 2.0, "common": 2 / 3}, "multilabel": {"rare": 3.0, "common": 1 / 3}}[kind]
    assert dict(zip(head.options.classes, head.class_weights.tolist(), strict=True)) == pytest.approx(expected)
    first = Recipe.load(str(output / "last" / "recipe.toml")).resolved_stages()[0]
    assert "class_counts" not in first.tasks["topic"]


def test_a_run_says_so_if_its_best_model_is_of_an_early_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """best/ has not seen the stages after it; only the number of its step gave that away."""
    values = {"stages": [{}, {"optimizer": {"lr": 1e-30, "head_lr": 1e-30}}], "training": {"max_steps": 2}}
    recipe = tmp_path / "staged.toml"
    recipe.write_text(Recipe.load("demonstration").with_values(values, "test").to_toml(), encoding="utf-8")
    train.main(small_run(small_data(tmp_path / "data"), tmp_path / "run", "--recipe", str(recipe), "--lr", "1e-3"))
    line = "best/ is of step 1, in stage 1 of 2: no later evaluation had a better score; last/ is the model of the last step"
    assert line in capsys.readouterr().out
    assert line in json.loads((tmp_path / "run" / "summary.json").read_text())["notices"]
    assert line in (tmp_path / "run" / "report.html").read_text()
