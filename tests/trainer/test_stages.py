# SPDX-License-Identifier: Apache-2.0
"""A stage as the loop gets it: its batches, its length and its step follow the recipe, task by task."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minbert_fast import BertModel
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.captured import Captures
from minbert_fast.tasks import MultitaskModel
from minbert_fast.trainer import stages
from minbert_fast.trainer.datasets import load_datasets
from minbert_fast.trainer.plan import Stage
from tests.small import TRAIN_ROWS, small_data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def build(
    folder: Path,
    /,
    *parts: dict[str, Any],
    positions: int = 128,
    where: tuple[Any, Any] = ("fp32", "fast"),
    **values: Any,
) -> list[Stage]:
    """The stages of the default recipe with `values`, for a model with so many positions, in this precision and backend."""
    files = {"directory": str(folder), "cache": str(folder / "cache"), **values.pop("data", {})}
    values["training"] = {"batch_size": 8, **values.get("training", {})}
    recipe = Recipe().with_values({**values, "data": files, "stages": parts}, "test")
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    found = load_datasets(recipe, tokenizer, print)
    config = BertModel.from_pretrained(sample_directory().model).config
    model = MultitaskModel(BertModel(replace(config, max_position_embeddings=positions)), found.tasks)
    context = stages.StageContext(model, tokenizer, found.train, torch.device("cpu"), *where, World(), Captures())
    return [stages.build_stage(context, found.recipe, index) for index in range(max(1, len(parts)))]


def first_batch(stage: Stage) -> MultitaskBatch:
    return next(stage.batches(0, 1))


def test_a_tasks_own_values_shape_its_batches(data: Path) -> None:
    """Its batch size, the rows that it draws in an epoch, and how it reads a pair; the tokens of a sequence are limited."""
    tasks = {"sentiment": {"batch_size": 5}, "paraphrase": {"encoder": "cross"}, "similarity": {"fraction": 0.2}}
    (stage,) = build(data, tasks=tasks, data={"max_length": 9})
    batch = first_batch(stage)
    assert {name: len(rows) for name, rows in batch.rows.items()} == {"sentiment": 5, "paraphrase": 8, "similarity": 8}
    assert batch.arity == {"sentiment": 1, "paraphrase": 1, "similarity": 2}
    assert batch.packed.cu_seqlens.diff().max() == 9
    assert stage.steps_per_epoch == TRAIN_ROWS // 5
    (alone,) = build(data, tasks={"sentiment": False, "paraphrase": False, "similarity": {"fraction": 0.2}})
    assert alone.steps_per_epoch == TRAIN_ROWS // 5 // 8
    (doubled,) = build(data, regularisation={"r_drop": 1.0})
    assert first_batch(doubled).duplicated == {"sentiment", "paraphrase", "similarity"}


def test_a_cpu_in_bf16_gets_batches_of_few_sizes(data: Path) -> None:
    """Each new number of rows makes it compile eight products. Nothing but the number of rows changes."""
    sizes = {}
    for where in (("fp32", "fast"), ("bf16", "reference"), ("bf16", "fast")):
        (stage,) = build(data, where=where)
        batches = list(stage.batches(0, 5))
        sizes[where] = [batch.packed.tokens.numel() for batch in batches]
        tokens = [batch.packed.num_tokens for batch in batches]
    exact, reference, rounded = sizes.values()
    assert exact == reference == tokens
    assert rounded == [-(-count // 64) * 64 for count in tokens] != tokens


def test_a_stages_own_values_shape_it(data: Path) -> None:
    """Its order of rows, its length, its tasks, and its own steps in the place of epochs."""
    first, second, third = build(
        data,
        {},
        {"training": {"epochs": 3.0}},
        {"training": {"max_steps": 7, "patience": 2}, "tasks": {"sentiment": {}}},
    )
    assert [stage.steps for stage in (first, second, third)] == [5, 15, 7]
    assert [stage.patience for stage in (first, second, third)] == [0, 0, 2]
    assert list(first_batch(third).rows) == ["sentiment"]
    rows = [first_batch(stage).rows["sentiment"].tolist() for stage in (first, second, third)]
    assert len({tuple(each) for each in rows}) == 3
    (again, *_) = build(data, {})
    assert first_batch(again).rows["sentiment"].tolist() == rows[0]


def test_a_stage_reads_no_further_than_the_models_positions(data: Path) -> None:
    """Only the whole recipe's maximum length was cut to them, not that of a stage."""
    short, long = build(data, {}, {"data": {"max_length": 64}}, positions=11, data={"max_length": 9})
    assert [int(first_batch(stage).packed.cu_seqlens.diff().max()) for stage in (short, long)] == [9, 11]


def test_the_window_of_weights_is_the_stages_epoch_unless_it_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "make_step", lambda backend, model, recipe, *_: recipe.weighting)
    for window, expected in ((0, 5), (3, 3)):
        (stage,) = build(data, weighting={"method": "dwa", "window": window})
        weighting: Any = stage.build_step()
        assert weighting.window == expected
