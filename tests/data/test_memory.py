# SPDX-License-Identifier: Apache-2.0
"""Rows in memory in every form, and data sets that the `datasets` library loads: the same rows, refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch

from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.data.cache import load_tokens
from minbert_fast.data.files import Table, read_rows
from minbert_fast.data.inputs import Input, find_input
from minbert_fast.data.label_summary import LabelSummary, summarise_labels
from minbert_fast.data.labels import Classes, ClassSets, Rule
from minbert_fast.data.messages import DataError
from minbert_fast.data.readers import hub
from minbert_fast.data.source import Source

datasets = pytest.importorskip("datasets")

RULE = Classes(("no", "yes"))
TEXTS = (["one, two", "two\nlines", "é 😀"], ["b", "", "c"])
LABELS = ["yes", "no", "yes"]


def as_dicts() -> list[dict[str, Any]]:
    return [{"sentence1": a, "sentence2": b, "label": c} for a, b, c in zip(*TEXTS, LABELS, strict=True)]


def as_columns() -> dict[str, list[str]]:
    return {"sentence1": TEXTS[0], "sentence2": TEXTS[1], "label": LABELS}


FORMS: dict[str, Callable[[], object]] = {
    "dicts": as_dicts,
    "tuples": lambda: list(zip(*TEXTS, LABELS, strict=True)),
    "lists": lambda: [list(row) for row in zip(*TEXTS, LABELS, strict=True)],
    "columns": as_columns,
    "arrays": lambda: {key: np.array(values) for key, values in as_columns().items()},
    "frame": lambda: pandas.DataFrame(as_columns(), index=[7, 8, 9]),
    "frame with categories": lambda: pandas.DataFrame(as_columns()).astype({"label": "category"}),
    "frame of strings": lambda: pandas.DataFrame(as_columns()).convert_dtypes(),
    "arrow": lambda: pa.table(as_columns()),
    "dataset": lambda: datasets.Dataset.from_dict(as_columns()),
    "numbered classes": lambda: datasets.Dataset.from_dict(as_columns()).class_encode_column("label"),
    "frame without names": lambda: pandas.DataFrame(list(zip(*TEXTS, LABELS, strict=True))),
    "numbers": lambda: {**as_columns(), "label": [1, 0, 1.0]},
    "tensor": lambda: {**as_columns(), "label": torch.tensor([1, 0, 1])},
    "tensors": lambda: [{**row, "label": torch.tensor(row["label"] == "yes")} for row in as_dicts()],
    "booleans": lambda: [{**row, "label": row["label"] == "yes"} for row in as_dicts()],
}


def find(rows: object, texts: int = 2, **keys: Any) -> Input:
    found = find_input(Source(**keys), "train", texts, rows=rows)
    assert found is not None
    return found


def read(rows: object, rule: Rule | None = None, texts: int = 2, **keys: Any) -> Table:
    return read_rows(find(rows, texts, **keys), rule, max_bad_rows=1.0)


def refused(rows: object, rule: Rule | None = None, texts: int = 2, **keys: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(rows, rule, texts, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- In memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_rows(form: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"values": {"true": "yes", "false": "no"}} if form in ("booleans", "tensors") else {}
    keys |= {"text": ("0", "1"), "label": "2"} if form == "frame without names" else {}
    found = find(FORMS[form](), **keys)
    table = read_rows(found, RULE, max_bad_rows=0.0)
    assert table.sentences == TEXTS
    assert table.labels is not None
    assert table.labels.tolist() == [1, 0, 1]
    assert table.lines.tolist() == [1, 2, 3]
    assert table.ids == ["1", "2", "3"]
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    tokens = load_tokens(found, RULE, tokenizer, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert tokens.texts() == TEXTS
    assert tokens.locate(1) == "train-rows:2"
    assert tokens.columns[0][1].tolist() == tokenizer.encode([TEXTS[0][1]])[0].tolist()


def test_a_fingerprint_is_that_of_the_rows(tmp_path: Path) -> None:
    """A resumed run notices other rows, and other labels."""
    relabelled = [{**row, "label": "no"} for row in as_dicts()]
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    hashes = [
        load_tokens(find(rows), RULE, tokenizer, cache_dir=tmp_path).source_hash
        for rows in (as_dicts(), as_dicts(), [*as_dicts(), as_dicts()[0]], as_dicts()[::-1], relabelled)
    ]
    assert hashes[0] == hashes[1] != ""
    assert len(set(hashes)) == 4


def test_a_single_text_needs_no_tuple_and_a_label_is_optional() -> None:
    assert read(["a", "b"], texts=1).sentences == (["a", "b"],)
    table = read([("a", "yes"), ("b", "no")], RULE, texts=1)
    assert table.sentences == (["a", "b"],)
    assert table.labels is not None
    assert read([("a", "b", "c")], texts=3).sentences == (["a"], ["b"], ["c"])
    assert "no column 'label'" in refused([("a", "b")], RULE)


def test_columns_are_named_and_nested() -> None:
    for dotted in ([{"q.text": "a", "q": 1}], pandas.DataFrame({"q.text": ["a"], "q": [1]})):
        assert read(dotted, texts=1, text="q.text").sentences == (["a"],)
    rows = [{"q": {"text": "a"}, "answer": "b", "ok": 1}, {"q": {}, "answer": "c", "ok": 0}]
    table = read(rows, RULE, text=("q.text", "answer"), label="ok")
    assert table.sentences == (["a"], ["b"])
    assert [str(bad) for bad in table.bad_rows] == ["train-rows:2: no key 'q.text', found 'q, answer, ok'"]
    whole = datasets.Dataset.from_list([{"q": {"text": "a", "n": 1}, "answer": "b", "ok": 1}])
    assert read(whole, RULE, text=("q.text", "answer"), label="ok").sentences == (["a"], ["b"])
    assert "no column 'answers'; expected columns q.text, answers, ok" in refused(
        whole, RULE, text=("q.text", "answers"), label="ok"
    )


@pytest.mark.parametrize("value", ["a film", 1])
def test_a_column_in_memory_is_a_list(value: object) -> None:
    """A text was taken for a column of its letters; a number ended in a TypeError."""
    assert refused({"text": value}, texts=1) == f"train-rows: column 'text' is {value!r}, expected a list"


def test_missing_values_are_bad_rows() -> None:
    frame = pandas.DataFrame({"text": ["a", None, "c", "d"], "label": [1, 0, np.nan, 1]})
    table = read(frame, RULE, texts=1)
    assert table.sentences == (["a", "d"],)
    assert table.labels is not None
    assert table.labels.tolist() == [1, 1]
    assert [str(bad) for bad in table.bad_rows] == [
        "train-rows:2: text is None, expected text",
        "train-rows:3: label is missing",
    ]


def test_classes_of_a_data_set_keep_their_order_and_names() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["5", "1"])})
    found = find(datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features), 1)
    assert found.layout.classes == ("5", "1")
    assert summarise_labels(found).names() == ("5", "1")  # -1 is no class: SNLI's train split has such rows
    assert [str(bad) for bad in read(found.rows, Classes(("5", "1")), texts=1).bad_rows] == [
        "train-rows:3: label '-1' is not one of the 2 classes (5, 1)"
    ]
    beyond = found.rows.map(lambda row: {"label": max(row["label"], 0)}).cast_column("label", datasets.Value("int64"))
    assert summarise_labels(find(beyond, 1)).names() == ("0", "1")
    for rows in (found.rows.select([0, 1]), found.rows.select([0, 1]).with_format("torch")):
        assert summarise_labels(find(rows, 1)).names() == ("5", "1")
    table = read_rows(found, Classes(found.layout.classes), max_bad_rows=1.0)
    assert table.labels is not None
    assert table.labels.tolist() == [0, 1]  # not the classes of these numbers as names
    assert [bad.line for bad in table.bad_rows] == [3]
    several = datasets.Features({"text": datasets.Value("string"), "label": [datasets.ClassLabel(names=["x", "y"])]})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [[0, 1], []]}, features=several)
    assert summarise_labels(find(rows, 1)) == LabelSummary(2, listed={"x": 1, "y": 1}, lists=True, classes=("x", "y"))
    assert read(rows, ClassSets(("x", "y")), 1).labels.tolist() == [[1, 1], [0, 0]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train-rows: no rows"),
        ("text", "train-rows: rows of type str, expected a list of dicts or of tuples, a dict of lists"),
        (iter(["a"]), "train-rows: rows of type list_iterator"),
        ({"text": ["a"], "label": []}, "train-rows: columns of different lengths: text 1, label 0"),
        ({"text": []}, "train-rows: no rows after the header"),
        ([("a", "b", "c")], "train-rows:1: a row of 3 values, expected 1 of text, then a label: ('a', 'b', 'c')"),
        ([("a", 1), ("b",)], "train-rows:2: a row of 1 values, expected 1 of text, then a label: ('b',)"),
        ([{"text": "a"}, ("b",)], "train-rows:2: expected a dict, found ('b',)"),
        ([("a",), (3,)], "train-rows:2: text is 3, expected text"),
        (pandas.DataFrame({"body": ["a"]}), "train-rows: no text columns; expected columns text, or sentence"),
    ],
)
def test_mistakes_are_one_line(rows: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(find(rows, 1), None, max_bad_rows=0.1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- Data sets of the hub -----------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data set that `datasets` loads from a directory, without a network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, rows in (("train", 30), ("validation", 5)):
        lines = [f'"{split}, {i}",{i % 2}\n' for i in range(rows)]
        (folder / f"{split}.csv").write_text("text,label\n" + "".join(lines))
    hub.load.cache_clear()
    yield folder
    hub.load.cache_clear()


def test_a_data_set_is_read_by_its_splits(library: Path, tmp_path: Path) -> None:
    source = Source(hub=str(library))
    found = find_input(source, "train", 1)
    assert found is not None
    assert found.name == f"{library}/train"
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    tables = [load_tokens(found, RULE, tokenizer, cache_dir=tmp_path / "tokens") for _ in range(2)]
    for table in tables:
        assert table.texts()[0][:2] == ["train, 0", "train, 1"]
        assert table.labels is not None
        assert table.labels[:3].tolist() == [0, 1, 0]
        assert table.locate(3) == f"{library}/train:4"
        assert table.source_hash == tables[0].source_hash != ""
    assert len(list((tmp_path / "tokens").iterdir())) == 1  # a data set may be large: its tokens are cached
    assert find_input(source, "test", 1) is None
    dev = find_input(source, "dev", 1)
    assert dev is not None
    assert len(read_rows(dev, RULE)) == 5
    assert summarise_labels(dev).counts == {"0": 3, "1": 2}


def test_data_sets_that_cannot_be_loaded_are_one_line(library: Path) -> None:
    def message(**keys: Any) -> str:
        with pytest.raises(DataError) as caught:
            find_input(Source(**keys), "dev", 1)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message(hub=str(library), dev="unseen") == f"{library}: no split 'unseen'; it has train, validation"
    assert message(hub="nobody/nothing").startswith("nobody/nothing: cannot be loaded by datasets: ")
    assert message(hub=str(library), config="other").startswith(f"{library}: cannot be loaded by datasets: ")
    script = library.parent / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text("raise SystemExit('code of a data set was run')\n")
    assert message(hub=str(script)).startswith(f"{script}: cannot be loaded by datasets: ")


def test_without_the_library_the_extra_is_named(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs datasets: pip install 'minbert-fast\[data\]'"):
        find_input(Source(hub=str(library)), "train", 1)
