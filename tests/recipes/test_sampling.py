# SPDX-License-Identifier: Apache-2.0
"""How a recipe draws rows: schemes, fractions, drawing by class, with replacement, down-sampling, parts of dev and train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast.data.sampling import Draw, Sampler, TaskSampler, philox, subset
from minbert_fast.data.sentences import Text, Tokens
from minbert_fast.data.tokens import TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import build_tasks
from minbert_fast.trainer.job import Options, train
from tests.small import read_records, small_data


def table_of(name: str, labels: list[float] | np.ndarray | None, rows: int | None = None) -> TokenTable:
    """A table whose sentence number i is [i], with ids row-i and lines i + 2."""
    count = len(labels) if labels is not None else rows or 0
    return TokenTable(
        task=name,
        path=Path(f"{name}.csv"),
        columns=(Tokens.of([[i] for i in range(count)]),),
        labels=None if labels is None else np.asarray(labels),
        ids=Text.of([f"row-{i}" for i in range(count)]),
        lines=np.arange(count) + 2,
        bad_rows=(),
        source_hash="",
    )


def one_pass(draw: Draw, labels: list[float] | np.ndarray, turn: int = 0) -> np.ndarray:
    sampler = TaskSampler(len(labels), 8, draw, np.asarray(labels))
    drawn = sampler.shuffle(philox(5, "task", 0, turn))
    assert len(drawn) == sampler.count
    return drawn


# ---- Drawing by class ------------------------------------------------------------------------------------------------

RARE = np.array([0] * 900 + [1] * 90 + [2] * 10)


def test_with_replacement_a_row_has_weight_one_over_the_rows_of_its_class() -> None:
    """torch's WeightedRandomSampler with weights 1 / class count, as in Siamese minBERT: chi-square over rows of a class."""
    labels = np.array([0] * 60 + [1] * 20 + [2] * 4)
    sampler = TaskSampler(len(labels), 8, Draw(0.5, balanced=True, replacement=True), labels)
    assert sampler.count == 42
    passes = [sampler.shuffle(philox(5, "task", 0, turn)) for turn in range(2_000)]
    drawn = np.bincount(np.concatenate(passes), minlength=len(labels))
    shares = np.array([drawn[labels == label].sum() for label in range(3)]) / drawn.sum()
    np.testing.assert_allclose(shares, 1 / 3, atol=0.01)
    for label in range(3):
        own = drawn[labels == label]
        chi = ((own - own.mean()) ** 2 / own.mean()).sum()
        assert chi < 2 * len(own) + 12, f"class {label}: its rows are not drawn alike"
    assert any(len(set(rows.tolist())) < len(rows) for rows in passes), "no row was ever drawn twice in a pass"
    assert any(len(set(labels[rows])) == 3 and (labels[rows] == 0).sum() != 14 for rows in passes), "shares are fixed"


def test_without_balance_replacement_draws_every_row_alike() -> None:
    drawn = np.concatenate([one_pass(Draw(replacement=True), RARE, turn) for turn in range(50)])
    counts = np.bincount(drawn, minlength=len(RARE))
    assert ((counts - 50) ** 2 / 50).sum() < 1.2 * len(RARE)
    assert (counts != 50).any()


def test_balanced_passes_hold_each_class_equally_often() -> None:
    drawn = one_pass(Draw(0.3, balanced=True), RARE)
    assert np.bincount(RARE[drawn]).tolist() == [100, 100, 100]
    assert len(set(drawn[RARE[drawn] == 1].tolist())) == 90, "a rare class's rows all occur before one recurs"
    assert (np.diff(RARE[drawn]) != 0).sum() > 100, "the classes are mixed"
    assert np.bincount(RARE[one_pass(Draw(0.1, balanced=True), RARE)]).tolist() == [34, 33, 33]


def test_down_sampling_keeps_at_most_so_many_rows_of_each_class_and_none_twice() -> None:
    first, second = (one_pass(Draw(per_class=90), RARE, turn) for turn in (0, 1))
    assert np.bincount(RARE[first]).tolist() == [90, 90, 10]
    assert len(set(first.tolist())) == len(first)
    assert set(first[RARE[first] == 0].tolist()) != set(second[RARE[second] == 0].tolist()), "each pass draws anew"
    assert set(np.flatnonzero(RARE != 0)) <= set(first.tolist())


def test_graded_labels_belong_to_the_nearest_whole_number() -> None:
    labels = np.array([0.2, 0.4, 0.6, 1.4, 3.6, 4.0, 4.4, 5.0], dtype=np.float32)
    drawn = one_pass(Draw(per_class=2), labels)
    assert np.bincount(np.rint(labels[drawn]).astype(int), minlength=6).tolist() == [2, 2, 0, 0, 2, 1]
    assert build_tasks(Recipe.load("wish-down-sampled"))["similarity"].options.per_class == 900


def test_draws_that_exclude_each_other_are_refused() -> None:
    for other in ({"fraction": 0.5}, {"balanced": True}, {"replacement": True}):
        with pytest.raises(ValueError, match="per_class: expected no fraction"):
            Draw(per_class=3, **other)
    with pytest.raises(ValueError, match="needs a label for each row"):
        TaskSampler(3, 8, Draw(balanced=True), np.array([0.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match="task text has no labels to draw by class"):
        Sampler.from_tables({"text": table_of("text", None, 4)}, 2, draws={"text": Draw(per_class=2)})


# ---- Schemes ---------------------------------------------------------------------------------------------------------


def test_cycle_restarts_short_tables_in_a_new_order() -> None:
    tables = {name: table_of(name, None, rows) for name, rows in (("long", 26), ("short", 7), ("twin", 7))}
    sampler = Sampler.from_tables(tables, 4)
    assert sampler.steps_per_epoch == 7
    epochs = [[sampler.rows(epoch * 7 + step) for step in range(7)] for epoch in range(2)]
    assert [[len(rows) for rows in step.values()] for step in epochs[0]] == [[4, 4, 4]] * 6 + [[2, 4, 4]]
    orders = []
    for epoch in epochs:
        drawn = {name: np.concatenate([step[name] for step in epoch]).tolist() for name in tables}
        assert sorted(drawn["long"]) == list(range(26)), "each row once an epoch"
        for name in ("short", "twin"):
            passes = [tuple(drawn[name][begin : begin + 7]) for begin in range(0, 28, 7)]
            assert all(sorted(each) == list(range(7)) for each in passes)
            orders += passes
    assert len(set(orders)) == len(orders), "each pass of each task has an order of its own"


def test_each_once_leaves_a_task_out_after_its_last_row() -> None:
    tables = {name: table_of(name, None, rows) for name, rows in (("long", 26), ("short", 7))}
    sampler = Sampler.from_tables(tables, 4, "each-once")
    steps = [sampler.rows(step) for step in range(sampler.steps_per_epoch)]
    assert [len(step["short"]) for step in steps] == [4, 3, 0, 0, 0, 0, 0]
    for name, table in tables.items():
        seen = np.concatenate([step[name] for step in steps]).tolist()
        assert sorted(seen) == list(range(len(table)))
        assert seen != sorted(seen)


def test_sequential_takes_all_batches_of_a_task_and_then_the_next_ones() -> None:
    tables = {name: table_of(name, None, rows) for name, rows in (("sst", 10), ("para", 25), ("sts", 7))}
    sampler = Sampler.from_tables(tables, 4, "sequential")
    assert sampler.steps_per_epoch == 3 + 7 + 2
    for epoch in range(2):
        steps = [sampler.rows(epoch * 12 + step) for step in range(12)]
        order = [[name for name, rows in step.items() if len(rows)] for step in steps]
        assert order == [["sst"]] * 3 + [["para"]] * 7 + [["sts"]] * 2
        for name, table in tables.items():
            seen = np.concatenate([step[name] for step in steps])
            assert sorted(seen.tolist()) == list(range(len(table))), "each row once an epoch"


def test_sequential_reads_a_quarter_of_a_task_an_epoch() -> None:
    tables = {"para": table_of("para", [0.0, 1.0] * 50), "sts": table_of("sts", [0.0] * 8)}
    draw = Draw(0.25, balanced=True, replacement=True)
    sampler = Sampler.from_tables(tables, 8, "sequential", draws={"para": draw})
    assert sampler.steps_per_epoch == 4 + 1
    assert [len(sampler.rows(step)["para"]) for step in range(5)] == [8, 8, 8, 1, 0]
    np.testing.assert_array_equal(
        sampler.rows(7)["para"], Sampler.from_tables(tables, 8, "sequential", draws={"para": draw}).rows(7)["para"]
    )
    assert sampler.rows(0)["para"].tolist() != sampler.rows(5)["para"].tolist(), "each epoch draws anew"


# ---- Parts of the dev and training rows ------------------------------------------------------------------------------


def test_a_subset_is_some_rows_in_order() -> None:
    rows = subset(20, 7, seed=3, name="dev/x")
    assert len(set(rows.tolist())) == 7
    assert rows.tolist() == sorted(rows.tolist()) == subset(20, 7, seed=3, name="dev/x").tolist()
    assert rows.tolist() != subset(20, 7, seed=4, name="dev/x").tolist()
    assert subset(5, 7, seed=3, name="dev/x").tolist() == list(range(5))


def test_a_run_scores_half_of_dev_and_some_training_rows(tmp_path: Path) -> None:
    data = small_data(tmp_path / "data")
    values: dict[str, Any] = {
        "data": {"directory": str(data), "cache": str(tmp_path / "cache")},
        "tasks": {"paraphrase": {"dev_fraction": 0.5}},
        "training": {"evaluate_train": 10, "batch_size": 8, "max_steps": 3, "precision": "fp32"},
    }
    output = train(Recipe.load("default").with_values(values, "test"), Options(tmp_path / "run", device="cpu"))
    written = {}
    for stem in ("sst", "para", "sts"):
        written[stem] = (output / "predictions" / f"{stem}-dev-output.csv").read_text().splitlines()[1:]
    files = {stem: len((data / f"{name}-dev.csv").read_text().splitlines()) - 1 for stem, name in FILES.items()}
    assert len(written["para"]) == round(files["para"] / 2) < files["para"]
    assert (len(written["sst"]), len(written["sts"])) == (files["sst"], files["sts"])
    details = json.loads((output / "predictions" / "details.json").read_text())["tasks"]["paraphrase"]
    texts = {line.split("\t")[0]: line.split("\t")[1:3] for line in quora_rows(data)}
    for wrong in details["worst"]:  # each error shows the sentences of its own row
        assert wrong["sentences"] == texts[wrong["id"]]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["train"].keys() == summary["dev"].keys()
    tenths = summary["train"]["sentiment_accuracy"] * 10
    assert tenths == pytest.approx(round(tenths)), "an accuracy over ten rows"
    records = read_records(output)
    assert [r["step"] for r in records if "train/score" in r] == [r["step"] for r in records if "dev/score" in r]


FILES = {"sst": "ids-sst", "para": "quora", "sts": "sts"}


def quora_rows(data: Path) -> list[str]:
    lines = (data / "quora-dev.csv").read_text().splitlines()
    start = lines[0].split("\t").index("id")
    return ["\t".join(line.split("\t")[start:]) for line in lines[1:]]
