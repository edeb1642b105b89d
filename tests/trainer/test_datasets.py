# SPDX-License-Identifier: Apache-2.0
"""The rows that a run trains on and those that judge it, where the stages of a recipe read different files."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast.common.schema import ConfigError
from minbert_fast.data import sample_directory
from minbert_fast.data.messages import DataError
from minbert_fast.data.tokenizer import Tokenizer
from minbert_fast.data.tokens import TokenTable
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.trainer.datasets import Datasets, load_datasets, load_split

SPLIT = {"kind": "classification"}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, rows in (("one", 40), ("two", 30), ("dev", 8), ("late", 6)):
        with Path(f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            table = [(f"{name} {row}", ("bad", "good")[row % 2]) for row in range(rows)]
            csv.writer(file).writerows([("text", "label"), *table])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(sample_directory().model)


def recipe(own: Any = None, *stages: Any, **task: Any) -> Recipe:
    """One task with its `own` data and those of each stage (None: the stage names none)."""
    options = {**(task or SPLIT), **({} if own is None else {"data": own})}
    named = [{"tasks": {"verdict": {} if data is None else {"data": data}}} for data in stages]
    return Recipe(name="staged", tasks={"verdict": options}, stages=tuple(named))


def texts(table: TokenTable) -> list[str]:
    return table.texts()[0]


def load(recipe: Recipe, tokenizer: Tokenizer) -> Datasets:
    return load_datasets(recipe, tokenizer, lambda line: None)


ONE, TWO = {"train": "one.csv"}, {"train": "two.csv"}
BOTH = {"train": ["one.csv", "two.csv"]}


@pytest.mark.parametrize(
    ("own", "stages", "rows"),
    [
        ([ONE, TWO], (None, None), 70),  # several data sets, which each stage chains anew
        (None, (ONE, BOTH), 40),
        (None, (BOTH, ONE), 70),
        (ONE, (TWO, None), 40),
        (ONE, (BOTH, TWO), 40),
        (BOTH, (), 70),
    ],
)
def test_no_stage_trains_on_held_out_rows(own: Any, stages: Any, rows: int, tokenizer: Tokenizer) -> None:
    data = load(recipe(own, *stages), tokenizer)
    held = texts(data.dev["verdict"])
    assert len(held) == rows // 10
    for tables in data.train:
        assert not set(texts(tables["verdict"])) & set(held)
    everything = {text for tables in data.train for text in texts(tables["verdict"])} | set(held)
    assert len(everything) == (40 if own == ONE and not stages else 70)


@pytest.mark.parametrize(
    ("own", "stages"),
    [
        ([ONE, TWO], (None, None)),
        (None, (ONE, BOTH)),
        (ONE, (TWO, None)),
        (None, ({**ONE, "dev": "dev.csv"}, TWO)),
        (None, (ONE, {**TWO, "dev": "dev.csv"})),
    ],
)
def test_evaluate_finds_the_dev_rows_of_a_staged_run(own: Any, stages: Any, tokenizer: Tokenizer) -> None:
    data = load(recipe(own, *stages), tokenizer)
    again = load_split(data.recipe, tokenizer, "dev", lambda line: None)
    assert texts(again["verdict"]) == texts(data.dev["verdict"])


def test_a_stage_may_name_the_dev_file(tokenizer: Tokenizer) -> None:
    data = load(recipe(None, {**ONE, "dev": "dev.csv"}, TWO), tokenizer)
    assert texts(data.dev["verdict"])[0] == "dev 0"
    assert [len(tables["verdict"]) for tables in data.train] == [40, 30]


def test_classes_that_differ_in_case_alone_are_named(tokenizer: Tokenizer) -> None:
    labels = ["Billing", "billing", "Login", "BILLING", "straße", "STRASSE", "Other"]
    rows = "".join(f"{label} {row},{label}\n" for row, label in enumerate(labels * 3))
    Path("tickets.csv").write_text("text,label\n" + rows, encoding="utf-8")
    said: list[str] = []
    load_datasets(recipe({"train": "tickets.csv"}), tokenizer, said.append)
    assert said[0].startswith(
        "tasks.verdict: classes that differ in case alone: BILLING, Billing, billing; STRASSE, straße (data.values = "
    )
    said.clear()
    load_datasets(recipe(ONE), tokenizer, said.append)
    assert not any("case alone" in line for line in said)


def test_a_guess_that_the_labels_refuse_is_not_announced(tokenizer: Tokenizer) -> None:
    Path("all.csv").write_text("text,label\n" + "a,good\n" * 12, encoding="utf-8")
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"^tasks\.verdict: all 12 rows have the label 'good'; expected two classes"):
        load_datasets(recipe({"train": "all.csv"}, kind=""), tokenizer, said.append)
    assert not said
    Path("free.csv").write_text("text,label\n" + "".join(f"a,x{i}\n" for i in range(50)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^tasks\.verdict: 50 different labels in 50 rows, not numbers"):
        load_datasets(recipe({"train": "free.csv"}, kind=""), tokenizer, said.append)
    load_datasets(recipe(ONE, kind=""), tokenizer, said.append)
    assert said[0] == 'tasks.verdict: kind = "classification" (2 different labels (bad, good))'


def test_data_that_no_task_reads_are_named(tokenizer: Tokenizer) -> None:
    """`--data` beside a recipe whose tasks name their own files had no effect, without a word."""
    own = recipe(ONE)
    said: list[str] = []
    load_datasets(replace(own, data=replace(own.data, directory="elsewhere")), tokenizer, said.append)
    assert "--data elsewhere is not read: every task names its own data (data.directory)" in said
    files = {"sentiment": {"train": "one.csv"}}
    load_datasets(replace(own, data=replace(own.data, files=files)), tokenizer, said.append)
    assert "data.files.sentiment is not read: no task of recipe staged takes its data from it" in said
    said.clear()
    folder = str(sample_directory().data)
    mixed = replace(own, tasks={**own.tasks, "sentiment": {}}, data=replace(own.data, directory=folder))
    load_datasets(mixed, tokenizer, said.append)
    assert not any("is not read" in line for line in said)


def test_stages_with_different_dev_files_are_refused(tokenizer: Tokenizer) -> None:
    staged = recipe(None, {**ONE, "dev": "dev.csv"}, {**TWO, "dev": "late.csv"})
    with pytest.raises(DataError, match=r"different dev data \(dev.csv, late.csv\): name .* in \[tasks.verdict\] data"):
        load(staged, tokenizer)


def test_a_preset_whose_stages_name_their_own_files_needs_no_data_folder(tokenizer: Tokenizer) -> None:
    """docs/pairs.md, premise and hypothesis: looked for snli-train.jsonl, and ignored the dev file."""
    rows = '{"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}\n' * 12
    for name in ("first", "second", "held"):
        Path(f"{name}.jsonl").write_text(rows, encoding="utf-8")
    stages = (
        {"train": "first.jsonl", "dev": "held.jsonl", "layout": "nli"},
        {"train": "second.jsonl", "layout": "nli"},
    )
    data = load(recipe(None, *stages, kind="nli"), tokenizer)
    assert data.dev["verdict"].path.name == "held.jsonl"
    assert [tables["verdict"].path.name for tables in data.train] == ["first.jsonl", "second.jsonl"]


def labels_of_one_table(rows: int = 200) -> Recipe:
    """Three tasks on two files with the same texts, and two on these texts without labels."""
    table = [(f"row {row}", row % 2, "xyz"[row % 3], row / 7) for row in range(rows)]
    for name in ("table", "copy"):
        with Path(f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "even", "third", "size"), *table])
    tasks: dict[str, Any] = {
        "even": {"kind": "classification", "data": {"train": "table.csv", "label": "even"}},
        "third": {"kind": "classification", "data": {"train": "table.csv", "label": "third"}},
        "size": {"kind": "regression", "data": {"train": "copy.csv", "label": "size"}},
        "mlm": {"kind": "masked-lm", "data": {"train": ["one.csv", "copy.csv"], "text": "text"}},
        "twice": {"kind": "contrastive", "data": {"train": "table.csv", "text": "text"}},
    }
    return Recipe(name="table", tasks=tasks)


def test_tasks_with_the_same_texts_hold_out_the_same_rows(tokenizer: Tokenizer) -> None:
    """Each held out others: a text that judged one task had trained the encoder in another."""
    said: list[str] = []
    data = load_datasets(labels_of_one_table(), tokenizer, said.append)
    held = texts(data.dev["even"])
    assert len(held) == 20
    assert all(texts(data.dev[name]) == held for name in ("third", "size"))
    (train,) = data.train
    words = data.dev["even"].columns[0].hashes
    assert not any(np.isin(table.columns[0].hashes, words).any() for table in train.values())
    sizes = {"even": 180, "third": 180, "size": 180, "mlm": 40 + 180, "twice": 180}
    assert {name: len(table) for name, table in train.items()} == sizes  # the rows of one.csv are others
    assert "20 training rows of mlm have texts that are held out for even: left out" in said
    counts = {name: np.bincount(data.dev[name].labels).tolist() for name in ("even", "third")}  # type: ignore[arg-type]
    assert counts["even"] == [10, 10]
    assert min(counts["third"]) >= 5
    for split, kept in (("dev", data.dev), ("train", train)):
        again = load_split(data.recipe, tokenizer, split, print)
        assert {name: texts(table) for name, table in again.items()} == {name: texts(kept[name]) for name in data.dev}


def test_every_class_of_tasks_with_the_same_texts_keeps_a_row(tokenizer: Tokenizer) -> None:
    staged = labels_of_one_table(30)
    rows = [(f"row {row}", row % 2, f"{row // 2}", row) for row in range(30)]
    with Path("table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "even", "third", "size"), *rows])
    for seed in range(5):
        data = load(staged.with_values({"training": {"seed": seed}}, ""), tokenizer)
        assert len(set(data.train[0]["third"].labels.tolist())) == 15  # type: ignore[union-attr]


def test_dev_rows_of_one_of_two_equal_files_that_has_changed_are_not_told(tokenizer: Tokenizer) -> None:
    data = load(labels_of_one_table(), tokenizer)
    with Path("copy.csv").open("a", encoding="utf-8") as file:
        file.write("one more,1,x,3\n")
    assert load_split(data.recipe, tokenizer, "dev", lambda line: None) == {}


def test_dev_rows_of_a_file_that_has_changed_are_not_told(tokenizer: Tokenizer) -> None:
    """evaluate held out a tenth of the new rows: nine of ten of them had been trained on."""
    data = load(recipe(ONE), tokenizer)
    splits = {split: load_split(data.recipe, tokenizer, split, print)["verdict"] for split in ("train", "dev")}
    assert texts(splits["train"]) == texts(data.train[0]["verdict"])
    assert texts(splits["dev"]) == texts(data.dev["verdict"])
    with Path("one.csv").open("a", encoding="utf-8") as file:
        file.write("one more,bad\n")
    said: list[str] = []
    assert load_split(data.recipe, tokenizer, "dev", said.append) == {}
    assert said == [f"{Path('one.csv')}: changed since the run held dev rows of verdict out of it: they cannot be told"]


@pytest.mark.parametrize(
    "lost",
    [
        {"data": {"dev": "dev.csv"}, "classes": ["bad", "good"]},
        {"data": {"text": "text", "label": "label"}, "classes": ["bad", "good"]},
        {"classes": ["bad", "good"]},
    ],
)
def test_a_task_whose_data_name_no_training_rows_is_refused(lost: dict[str, Any], tokenizer: Tokenizer) -> None:
    """The run trained the other tasks without a word."""
    both = replace(recipe(ONE), tasks={"verdict": {**SPLIT, "data": ONE}, "lost": {**SPLIT, **lost}})
    with pytest.raises(
        ConfigError, match=r"^tasks\.lost\.data: names no training rows; expected train = a file, hub = "
    ):
        load(both, tokenizer)


def test_a_task_that_no_stage_trains_is_named(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    for own in (TWO, {**TWO, "dev": "dev.csv"}):
        tasks = {"verdict": {**SPLIT, "data": ONE}, "other": {**SPLIT, "data": own}}
        staged = replace(recipe(ONE), tasks=tasks, stages=({"tasks": {"verdict": {}}},))
        kept = load_datasets(staged, tokenizer, said.append).tasks
        assert ("other" in kept) == ("dev" in own)
    assert said.count("other: no stage trains it, and it has no dev rows: left out") == 1


def test_a_share_to_hold_out_that_no_task_needs_is_named(tokenizer: Tokenizer) -> None:
    """It was ignored without a word."""
    line = "data.holdout = 0.3 is not used: every task has dev rows of its own"
    for source, share, expected in (
        ({**ONE, "dev": "dev.csv"}, 0.3, [line]),
        ({**ONE, "dev": "dev.csv"}, 0.0, []),
        (
            ONE,
            0.3,
            ["no dev rows for verdict: 12 of 40 training rows are held out for it (data.holdout = 0.3, seed 11711)"],
        ),
    ):
        said: list[str] = []
        load_datasets(recipe(source).with_values({"data": {"holdout": share}}, ""), tokenizer, said.append)
        assert [each for each in said if "data.holdout" in each] == expected


def test_no_dev_rows_are_taken_from_rows_that_the_run_trained_on(tokenizer: Tokenizer) -> None:
    """A run with a dev file, evaluated where only the training file is: a tenth of its training rows judged it."""
    data = load(recipe({**ONE, "dev": "dev.csv"}), tokenizer)
    assert data.recipe.data.held_out == {}
    alone = replace(data.recipe, tasks={"verdict": {**data.recipe.tasks["verdict"], "data": ONE}})
    assert load_split(alone, tokenizer, "dev", print) == {}
    assert len(load_split(alone, tokenizer, "train", print)["verdict"]) == 40


def test_a_file_that_is_cut_is_named_once_for_all_its_tasks(tokenizer: Tokenizer) -> None:
    """The line came once per task, with the bare name of a file whose texts alone are read, and without a stage's length."""
    tasks = {name: {**SPLIT, "data": ONE} for name in ("first", "second")}
    whole = Recipe(name="cut", tasks={**tasks, "texts_alone": {"kind": "masked-lm", "data": ONE}})
    whole = whole.with_paths(lambda path: str(Path(path).absolute()))
    stages = [{}, {"data": {"max_length": 3}}]
    lines: list[str] = []
    load_datasets(
        whole.with_values({"data": {"holdout": 0, "max_length": 2}, "stages": stages}, ""), tokenizer, lines.append
    )
    cut = [f"{Path('one.csv').absolute()}: 40 rows are cut to {length} tokens (data.max_length)" for length in (2, 3)]
    assert [line for line in lines if "are cut" in line] == cut


def test_dev_rows_that_repeat_training_rows_are_counted(tokenizer: Tokenizer) -> None:
    """A pair repeats a pair, not its texts in another order; the stage that repeats most counts."""
    rows = ["x,y,1", "x,z,0", "y,x,1", "z,z,0"] * 3
    files = {"train": [*rows, "w,w,1"], "other": ["p,q,1", "q,p,0"], "dev": ["x,y,0", "w,w,0", "y,w,1", "y,y,0"]}
    files["few"] = ["x,y,0", *["y y,w,1"] * 100]
    for name, lines in files.items():
        Path(f"{name}-pairs.csv").write_text("\n".join(["sentence1,sentence2,label", *lines]) + "\n")
    kind, dev = {"kind": "pair-classification"}, {"dev": "dev-pairs.csv"}
    said: list[str] = []
    stages = [{"train": "other-pairs.csv", **dev}, {"train": "train-pairs.csv", **dev}]
    load_datasets(recipe(None, *stages, **kind), tokenizer, said.append)
    repeated = "dev rows of verdict repeat the texts of training rows, so they are easier than new texts"
    assert [line for line in said if "repeat" in line] == [f"2 of 4 {repeated}"]
    said.clear()
    load_datasets(recipe(stages[0], **kind), tokenizer, said.append)
    load_datasets(recipe({**stages[1], "dev": "few-pairs.csv"}, **kind), tokenizer, said.append)  # fewer than 1 %
    assert [line for line in said if "repeat" in line] == []
    load_datasets(recipe({"train": "train-pairs.csv"}, **kind), tokenizer, said.append)  # held-out rows have doubles
    assert [line for line in said if "repeat" in line] == [f"1 of 1 {repeated}"]


def test_ten_rows_are_the_fewest_of_which_some_are_held_out(tokenizer: Tokenizer) -> None:
    for rows in (9, 10):
        lines = (f"text {row},{('bad', 'good')[row % 2]}" for row in range(rows))
        Path("few.csv").write_text("\n".join(["text,label", *lines]) + "\n")
        assert ("verdict" in load(recipe({"train": "few.csv"}), tokenizer).dev) == (rows == 10)


def test_bad_rows_are_shown_and_counted(tokenizer: Tokenizer) -> None:
    Path("torn.csv").write_text("text,label\n" + "a,good\nb,bad\n" * 9 + "c\n" * 5, encoding="utf-8")
    said: list[str] = []
    load_datasets(
        recipe({"train": "torn.csv"}).with_values({"data": {"max_bad_rows": 1.0}}, ""), tokenizer, said.append
    )
    shown = [f"torn.csv:{line}: 1 fields, expected 2" for line in (20, 21, 22)]
    assert [line for line in said if line.startswith("torn.csv")] == [*shown, "torn.csv: 2 more bad rows"]


def test_a_few_rows_are_all_trained_on(tokenizer: Tokenizer) -> None:
    said: list[str] = []
    data = load_datasets(recipe({"train": "late.csv"}), tokenizer, said.append)
    assert len(data.train[0]["verdict"]) == 6
    assert not data.dev
    assert "no dev rows for verdict: trained, not evaluated; best/ will be the last model" in said


def test_names_that_no_task_and_no_layout_has_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^data: recipe staged has no task 'verdit' \(it has verdict\)$"):
        load_datasets(recipe(ONE), tokenizer, print, {"verdit": {"train": []}})
    named = recipe(ONE).with_values({"data": {"files": {"sentimnt": {"train": "one.csv"}}}}, "")
    with pytest.raises(DataError, match=r"^data\.files\.sentimnt: no such dataset; known are sentiment, "):
        load_datasets(named, tokenizer, print)


def test_other_dev_rows_are_other_data_of_a_resumed_run(tokenizer: Tokenizer) -> None:
    own = recipe({**ONE, "dev": "dev.csv"})
    before = load(own, tokenizer).fingerprint()
    Path("dev.csv").write_text("text,label\nanother,good\n", encoding="utf-8")
    after = load(own, tokenizer).fingerprint()
    assert before["train"] == after["train"]
    assert before["dev"] != after["dev"]
