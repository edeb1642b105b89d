# SPDX-License-Identifier: Apache-2.0
"""A value that nothing reads is named; values that something reads, and those of the shipped recipes, are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minbert_fast import train
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.tasks import build_tasks
from minbert_fast.tasks.unused import unused_values
from minbert_fast.trainer.loading import without_effect
from tests.small import small_data, small_run


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"optimizer": {"gamma": 0.5}}, ['optimizer.gamma = 0.5 is not used: it belongs to schedule = "exponential"']),
        ({"optimizer": {"gamma": 0.5, "schedule": "exponential"}}, []),
        (
            {"optimizer": {"decay_all": False}},
            ["optimizer.decay_all = False is not used: it belongs to weight_decay"],
        ),
        ({"optimizer": {"decay_all": False, "weight_decay": 0.1}}, []),
        (
            {
                "tasks": {
                    "similarity": {"features": ["u", "v", "product"]},
                    "sentiment": {"class_counts": [1, 2, 3, 4, 5]},
                }
            },
            [
                'tasks.sentiment.class_counts = (1, 2, 3, 4, 5) is not used: it belongs to class_weights = "balanced"',
                "tasks.similarity.features = ('u', 'v', 'product') is not used: "
                'it belongs to head = "linear" on two vectors',
            ],
        ),
        (
            {"weighting": {"method": "dwa", "lr": 0.1, "window": 5}},
            ['weighting.lr = 0.1 is not used: it belongs to method = "uncertainty"'],
        ),
        ({"weighting": {"method": "famo", "logit_lr": 0.1}}, []),
        (
            {"regularisation": {"radius": 0.1, "momentum": 0.9, "smart": 1.0}},
            ["regularisation.momentum = 0.9 is not used: it belongs to proximal"],
        ),
        (
            {"tasks": {"similarity": {"temperature": 0.1, "margin": 0.5, "scale": 2.0}}},
            [
                "tasks.similarity.margin = 0.5 is not used: it belongs to cosine_embedding",
                "tasks.similarity.temperature = 0.1 is not used: it belongs to cosent and ranking",
            ],
        ),
        ({"tasks": {"similarity": {"temperature": 0.1, "auxiliary": {"cosent": 0.1}}}}, []),
        (
            {"tasks": {"mlm": {"stem": "words", "dev_fraction": 0.5}}},
            [
                "tasks.mlm.dev_fraction = 0.5 is not used: it belongs to tasks with predictions",
                "tasks.mlm.stem = 'words' is not used: it belongs to tasks with predictions",
            ],
        ),
        (
            {"tasks": {"topic": {"kind": "multilabel", "data": "x.csv", "row_count": 9}}},
            ['tasks.topic.row_count = 9 is not used: it belongs to class_weights = "balanced"'],
        ),
        (
            {"tasks": {"similarity": {"dropout": 0.4}}},
            ["tasks.similarity.dropout = 0.4 is not used: it belongs to dropout_at"],
        ),
        ({"tasks": {"similarity": {"dropout": 0.4, "shared_layers": "pairs"}}}, []),
        ({"tasks": {"similarity": {"dropout": 0.4, "dropout_at": ["embedding"]}}}, []),
        ({"tasks": {"similarity": {"dropout": 0.4, "dropout_at": []}}}, []),
        (
            {"tasks": {"similarity": {"head": "linear", "scale": 2.0, "loss": "bce", "labels": "raw"}}},
            [
                'tasks.similarity.labels = \'raw\' is not used: it belongs to loss = "mse" and "l1"',
                'tasks.similarity.scale = 2.0 is not used: it belongs to head = "cosine"',
            ],
        ),
        (
            {"tasks": {"nli-triplets": {"margin": 0.5, "temperature": 0.1}}},
            ["tasks.nli-triplets.margin = 0.5 is not used: it belongs to objectives.triplet"],
        ),
        (
            {"tasks": {"sentiment": {"shared_depth": 3, "temperature": 0.1}}},
            [
                "tasks.sentiment.shared_depth = 3 is not used: it belongs to shared_layers",
                "tasks.sentiment.temperature = 0.1 is not used: it belongs to nearest",
            ],
        ),
    ],
)
def test_a_value_that_nothing_reads_is_named(values: dict[str, Any], lines: list[str]) -> None:
    assert list(unused_values(Recipe.load("default").with_values(values, "test"))) == lines


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_of_a_shipped_recipe_is_used(name: str) -> None:
    for stage in Recipe.load(name).resolved_stages():
        assert not list(unused_values(stage))


def run(folder: Path, recipe: str, *flags: str) -> list[str]:
    """The notices of a run of one step."""
    path = folder / "recipe.toml"
    path.write_text(f'name = "own"\n{recipe}', encoding="utf-8")
    data, output = small_data(folder / "data"), folder / "run"
    train.main(small_run(data, output, "--recipe", str(path), "--max-steps", "1", "--overwrite", *flags))
    notices: list[str] = json.loads((output / "summary.json").read_text())["notices"]
    return notices


def test_a_run_says_it_once_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was ignored without a word."""
    line = "tasks.similarity.temperature = 0.1 is not used: it belongs to cosent and ranking"
    notices = run(tmp_path, "[tasks.similarity]\ntemperature = 0.1\n")
    assert capsys.readouterr().out.count(line) == notices.count(line) == 1


FROZEN = "is not used: the encoder is frozen"


@pytest.mark.parametrize(
    ("recipe", "lines"),
    [
        (
            "[model]\nfreeze = true\n[optimizer]\nlr = 0.5\nhead_lr = 0.1\nlayer_decay = 0.9\n[tasks.sentiment]\n",
            [
                f"optimizer.lr = 0.5 {FROZEN}, and the heads have optimizer.head_lr = 0.1",
                f"optimizer.layer_decay = 0.9 {FROZEN}",
            ],
        ),
        ("[model]\nfreeze = true\n[optimizer]\nlr = 0.5\n[tasks.sentiment]\n", []),
        (
            "[regularisation]\nr_drop = 0.5\n[tasks.mlm]\ntext = ['sentiment']\ndata = { train = 'a.txt', dev = 'a.txt' }\n",
            [
                "tasks.mlm.data.dev is not read: masked-lm only trains",
                "regularisation.r_drop = 0.5 is not used: it belongs to tasks with predictions",
            ],
        ),
    ],
)
def test_a_value_that_no_stage_uses_is_named(
    recipe: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of the encoder had no effect beside `--freeze` and `head_lr`, without a word."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a few words of a text\n" * 9, encoding="utf-8")
    found = [line for line in run(tmp_path, recipe) if "not used" in line or "not read" in line]
    assert len(found) == len(lines)
    assert all(map(str.startswith, found, lines))


def test_no_shipped_recipe_has_a_value_that_no_stage_uses() -> None:
    for name in recipe_names():
        recipe = Recipe.load(name)
        assert not list(without_effect(recipe.resolved_stages(), build_tasks(recipe))), name
