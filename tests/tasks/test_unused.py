# SPDX-License-Identifier: Apache-2.0
"""A value that nothing reads is named; values that something reads, and those of the shipped recipes, are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.tasks.unused import unused_values
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


def test_a_run_says_it_once_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was ignored without a word."""
    flags = ["--max-steps", "1", "--set", "tasks.similarity.temperature=0.1", "--set", "training.start=best"]
    assert cli.run(train.main, small_run(small_data(tmp_path / "data"), tmp_path / "run", *flags)) == 0
    printed, notices = capsys.readouterr().out, json.loads((tmp_path / "run" / "summary.json").read_text())["notices"]
    for line in (
        "tasks.similarity.temperature = 0.1 is not used: it belongs to cosent and ranking",
        "training.start = 'best' is not used: it belongs to stages after the first",
    ):
        assert printed.count(line) == notices.count(line) == 1
