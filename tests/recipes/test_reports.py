# SPDX-License-Identifier: Apache-2.0
"""Every published row is a recipe whose resolved values are the report's conditions, with all of the report's numbers.

The rows come from tests/recipes/reports.py, which is typed from the reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from minbert_fast.common.schema import ConfigError, build
from minbert_fast.recipes.recipe import Recipe, recipe_names
from minbert_fast.tasks import Task, build_tasks
from tests.recipes.reports import METRICS, NLI_LABELS, ROWS, Row, Stage

FEATURES = {"u": "u", "v": "v", "abs_diff": "|u-v|", "product": "u*v", "cosine": "cos"}
LOSSES = {"bce": "BCE", "cross_entropy": "softmax", "mse": "MSE", "l1": "L1"}
RANGES = {"unit": "[0, 1]", "signed": "[-1, 1]", "raw": "raw labels"}


def head_of(task: Task) -> str:
    """A task's head and loss in the words of tests/recipes/reports.py."""
    o: Any = task.options
    if task.kind == "triplet":
        (objective,) = (name for name, weight in o.objectives.items() if weight)
        detail = {"contrastive": f", temperature {o.temperature:g}", "triplet": f", {o.distance}, margin {o.margin:g}"}
        return objective + detail[objective]
    if task.kind == "masked-lm":
        return f"{o.rate:.0%} of {', '.join(o.text)}".replace("%", " %")
    dropout = f"dropout {o.dropout:g}"
    if task.kind == "classification":
        parts = [f"{o.extra_layers} BERT layers"] if o.extra_layers else []
        if o.neighbours:
            parts.append(f"cosines to {o.neighbours} sentences a class and their labels")
        return ", ".join([*parts, *([dropout] if o.dropout else []), "linear"])
    parts = [f"each {dropout}"] if "embedding" in o.dropout_at else []
    parts += [f"shared {o.shared_depth} layers with {dropout}"] if o.shared_layers else []
    parts += (
        ["each linear keeping the width" if o.project is True else f"each linear to {o.project}"] if o.project else []
    )
    if o.loss == "cosine_embedding":
        return ", ".join([*parts, "cosine embedding", f"margin {o.margin:g}"])
    if o.head == "cosine":
        parts.append("cosine")
    else:
        parts.append(f"({', '.join(FEATURES[f] for f in o.features)})")
        parts += [dropout] if "features" in o.dropout_at else []
        parts.append("linear")
    on = f" on {RANGES[o.labels]}" if o.loss in ("mse", "l1") else ""
    return ", ".join([*parts, LOSSES[o.loss] + on])


def stage_of(recipe: Recipe) -> Stage:
    """What a resolved stage trains, and how."""
    optimizer, training = recipe.optimizer, recipe.training
    assert (optimizer.warmup, optimizer.clip, optimizer.head_lr, optimizer.layer_decay) == (0.0, 0.0, None, 1.0)
    decay = {"constant": 1.0, "exponential": optimizer.gamma, "linear": 0.0}[optimizer.schedule]
    return Stage(tuple(recipe.tasks), optimizer.lr, training.epochs, recipe.model.freeze, training.start, decay)


def named(row: Row, scores: tuple[float, ...]) -> dict[str, float]:
    """The scores by metric; one more than the row has tasks is the report's total."""
    metrics = [METRICS[task] for task in row.scored] + ["score"]
    assert len(scores) in (0, len(row.scored), len(row.scored) + 1)
    return dict(zip(metrics, scores, strict=False))


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_has_the_conditions_and_the_numbers_of_its_row(name: str) -> None:
    row, recipe = ROWS[name], Recipe.load(name)
    tasks = build_tasks(recipe)
    assert {task: head_of(tasks[task]) for task in tasks} == row.heads

    stages = tuple(stage_of(stage) for stage in recipe.resolved_stages())
    assert stages == row.stages

    assert recipe.model.dropout is None, "the encoder keeps its own dropout"
    assert recipe.model.pooling == row.pooling
    predicting = [task for task in tasks.values() if task.predicts]
    assert {task.name: task.pooling for task in predicting if task.pooling is not None} == row.own_pooling
    assert {task.options.batch_size or recipe.training.batch_size for task in tasks.values()} == {row.batch}
    if row.scheme is not None:
        assert recipe.data.scheme == row.scheme
    assert recipe.surgery.method == row.surgery
    assert (recipe.optimizer.weight_decay, recipe.optimizer.decay_all) == (row.weight_decay, True)
    assert {task.weight for task in tasks.values()} == {1.0}
    assert recipe.weighting.method == "none"
    assert not recipe.regularisation.duplicates_examples
    assert (recipe.regularisation.proximal, recipe.training.ema) == (0.0, 0.0)
    drawn = {n: (o.fraction, o.balanced, o.replacement, o.dev_fraction) for n, t in tasks.items() for o in [t.options]}
    assert drawn == dict.fromkeys(tasks, (1.0, False, False, 1.0)) | row.drawn
    assert all(task.options.per_class == 0 for task in tasks.values())

    published = recipe.published
    assert published.dev == named(row, row.dev)
    assert published.train == named(row, row.train)
    assert published.test == named(row, row.test)
    assert published.seconds == row.seconds
    assert published.row
    assert bool(recipe.training.evaluate_train) == bool(row.train), "train scores are measured where they are published"


def test_every_published_row_is_a_recipe_and_the_other_way_round() -> None:
    assert {name for name in recipe_names() if Recipe.load(name).published} == set(ROWS)
    assert len(ROWS) == 34


@pytest.mark.parametrize("name", ROWS)
def test_published_totals_follow_from_the_columns(name: str) -> None:
    for scores in (ROWS[name].dev, ROWS[name].test):
        if len(scores) == 4:
            a, b, c, total = scores
            assert (a + b + (c + 1) / 2) / 3 == pytest.approx(total, abs=1.1e-3)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_a_report_says_what_the_report_does_not(name: str) -> None:
    recipe = Recipe.load(name)
    assert bool(recipe.unstated) == (bool(recipe.source) or name == "course")
    if recipe.published:
        assert recipe.source
        known = {*build_tasks(recipe)}
        for split in ("dev", "train", "test"):
            metrics: Mapping[str, float] = getattr(recipe.published, split)
            assert all(m == "score" or m.rpartition("_")[0] in known for m in metrics)


def test_nli_regression_reads_every_labelled_pair_as_a_number() -> None:
    recipe = Recipe.load("bertology-nli-regression")
    assert recipe.data.holdout == 0
    for name, layout in (("snli", "snli"), ("mnli", "multinli")):
        task = build_tasks(recipe)[name]
        (source,) = task.sources
        assert (source.layout, source.values, task.options.range) == (layout, NLI_LABELS, (0, 1))


def test_enhancing_final_keeps_each_tasks_best_model() -> None:
    recipe = Recipe.load("enhancing-final")
    assert recipe.training.best_per_task
    selects = [stage.training.select for stage in recipe.resolved_stages()]
    assert selects == ["score", "sentiment_accuracy", "paraphrase_accuracy", "similarity_pearson"]


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ({"score": 0.5}, "published: unknown key 'score'"),
        ({"dev": {"accuracy": 0.5}}, "published.dev.accuracy: expected score, or TASK_METRIC"),
        ({"dev": {"sentiment_accuracy": 52.5}}, "published.dev.sentiment_accuracy = 52.5: expected -1 to 1"),
        ({"test": {"score": "high"}}, "published.test.score = 'high': expected a number"),
        ({"seconds": -1.0}, "published.seconds = -1.0: expected 0 or more"),
    ],
)
def test_published_scores_are_checked(published: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Recipe, {"published": published}, "mine.toml")
    assert expected in str(caught.value)


def test_a_wrong_condition_is_noticed() -> None:
    """The comparison above is not blind: the encoder's dropout, the loss's labels, and a stage's start count."""
    recipe = Recipe.load("bertology-nli-triplet")
    raw = recipe.with_values({"tasks": {"similarity": {"labels": "raw"}}}, "test")
    assert head_of(build_tasks(raw)["similarity"]) != ROWS["bertology-nli-triplet"].heads["similarity"]
    later = replace(recipe, training=replace(recipe.training, start="last")).resolved_stages()[1]
    assert stage_of(later) != ROWS["bertology-nli-triplet"].stages[1]


def test_false_removes_an_inherited_task() -> None:
    assert list(Recipe.load("siamese-similarity-mse").tasks) == ["similarity"]
    recipe = Recipe.load("course").with_values({"tasks": {"paraphrase": False}}, "test")
    assert list(recipe.tasks) == ["sentiment", "similarity"]
    with pytest.raises(ConfigError, match="expected at least one task"):
        recipe.with_values({"tasks": {"sentiment": False, "similarity": False}}, "test")


@pytest.mark.parametrize(("start", "stage"), [(2, 1), (-1, 1), ("first", 1), (1, 0)])
def test_a_stage_starts_from_an_earlier_one(start: Any, stage: int) -> None:
    stages: list[dict[str, Any]] = [{}, {}]
    stages[stage] = {"training": {"start": start}}
    with pytest.raises(ConfigError, match=rf"stages\[{stage}\]\.training\.start = {start!r}: expected last, best, or"):
        build(Recipe, {"stages": stages}, "test")
