# SPDX-License-Identifier: Apache-2.0
"""Token tables of any input: from the cache, selected, chained, held out; and their texts read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.data.cache import load_tokens, tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.files import read_rows
from minbert_fast.data.inputs import Input, find_input
from minbert_fast.data.labels import Classes, ClassSets, Numbers, Rule
from minbert_fast.data.messages import DataError
from minbert_fast.data.pretraining import collect_pairs, collect_sentences
from minbert_fast.data.sampling import hold_out
from minbert_fast.data.sentences import Chained, Selected, Text, Tokens
from minbert_fast.data.source import Source
from minbert_fast.data.tokens import TokenTable, chain

RULE = Classes(("a", "b", "c"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(sample_directory().model)


def write(folder: Path, name: str, rows: int) -> Path:
    """Pairs; every fifth row has the label `-`, every seventh one that no rule knows."""
    path = folder / name
    with path.open("w") as file:
        for i in range(rows):
            label = "-" if i % 5 == 4 else "?" if i % 7 == 6 else "abc"[i % 3]
            row = {"text1": f"{name} {'film ' * (i % 4)}{i}", "text2": f"row {i}", "label": label, "n": i % 3}
            file.write(json.dumps(row) + "\n")
    return path


def find(*paths: Path, **keys: Any) -> Input:
    found = find_input(Source(train=tuple(map(str, paths)), skip="-", **keys), "train", 2)
    assert found is not None
    return found


def load(source: Input, tokenizer: Tokenizer, rule: Rule | None = RULE, **more: Any) -> TokenTable:
    return load_tokens(source, rule, tokenizer, max_bad_rows=0.5, **more)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Input:
    folder = tmp_path_factory.mktemp("rows")
    return find(write(folder, "one.jsonl", 40), write(folder, "two.jsonl", 25))


@pytest.fixture(scope="module")
def table(source: Input, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    return load(source, tokenizer, cache_dir=tmp_path_factory.mktemp("cache"))


def contents(table: TokenTable, rows: Sequence[int] | None = None) -> list[Any]:
    """All that a table holds of some rows, with the texts read again."""
    chosen = range(len(table)) if rows is None else rows
    texts = table.texts(rows)
    return [
        (
            *([column[row].tolist() for column in table.columns]),
            *([int(column.lengths[row]) for column in table.columns]),
            None if table.labels is None else table.labels[row].tolist(),
            table.ids[row],
            table.locate(row),
            *([column[place] for column in texts]),
        )
        for place, row in enumerate(chosen)
    ]


# ---- Tables of several files --------------------------------------------------------------------------------------------


def test_several_files_are_one_table_like_the_rows_in_memory(
    source: Input, table: TokenTable, tokenizer: Tokenizer
) -> None:
    direct = read_rows(source, RULE, max_bad_rows=0.5)
    assert table.texts() == direct.sentences
    assert table.labels is not None
    assert direct.labels is not None
    assert table.labels.tolist() == direct.labels.tolist()
    assert [table.ids[row] for row in range(len(table))] == direct.ids
    assert (table.bad_rows, table.skipped) == (direct.bad_rows, direct.skipped)
    assert table.skipped == 8 + 5
    one, two = source.files
    assert table.locate(0) == f"{one}:1"
    assert table.locate(len(table) - 1) == f"{two}:24"
    again = tokenize_table(direct, tokenizer)
    for ours, expected in zip(table.columns, again.columns, strict=True):
        assert [sentence.tolist() for sentence in ours] == [sentence.tolist() for sentence in expected]
        assert ours.lengths.tolist() == expected.lengths.tolist()
    assert again.texts([3, 0])[1] == [direct.sentences[1][3], direct.sentences[1][0]]


def test_skipped_rows_are_said_and_progress_covers_all_files(
    source: Input, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    said: list[str] = []
    seen: list[tuple[int, int, int]] = []
    load(source, tokenizer, cache_dir=tmp_path, notify=said.append, progress=lambda *n: seen.append(n))
    assert said == [
        f"{file}: {count} rows with the label '-' are left out"
        for file, count in zip(source.files, (8, 5), strict=True)
    ]
    total = sum(file.stat().st_size for file in source.files)
    assert [size for _, _, size in seen] == [total, total]
    assert seen == sorted(seen)
    assert seen[-1][1] == total


def test_each_file_layout_and_rule_has_an_entry(source: Input, tokenizer: Tokenizer, tmp_path: Path) -> None:
    one, two = source.files

    def built(found: Input, rule: Rule | None) -> int:
        """The number of files that were tokenized."""
        before = set(tmp_path.iterdir()) if tmp_path.exists() else set()
        load(found, tokenizer, rule, cache_dir=tmp_path)
        return len(set(tmp_path.iterdir()) - before)

    assert built(find(one, two), RULE) == 2
    assert built(find(two, one), RULE) == 0
    assert built(find(one), Classes(("a", "b", "c", "?"))) == 1
    assert built(find(one), None) == 1
    assert built(find(one, label="n"), Numbers(0, 2)) == 1
    assert built(find(one, label="n", values={"1": 0.5}), Numbers(0, 2)) == 1
    assert built(find(one, text=("text2", "text1")), RULE) == 1
    assert built(find(one, two), RULE) == 0
    with one.open("a") as file:
        file.write('{"text1": "new", "text2": "row", "label": "a"}\n')
    assert built(find(one, two), RULE) == 1
    one.write_text("".join(one.read_text().splitlines(keepends=True)[:-1]))


def test_labels_of_several_classes_are_rows_in_memory_and_from_the_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text,label\none,"a, b"\ntwo,\nthree,c\n')
    found = find_input(Source(train=str(path)), "train", 1)
    assert found is not None
    for _ in range(2):
        table = load_tokens(found, ClassSets(("a", "b", "c")), tokenizer, cache_dir=tmp_path / "cache")
        assert table.labels is not None
        assert table.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
        assert table.select([2, 0]).labels.tolist() == [[0, 0, 1], [1, 1, 0]]  # type: ignore[union-attr]
        batch = Collator({"x": table}, 8)({"x": np.array([1, 0])})
        assert batch.labels["x"].tolist() == [[0, 0, 0], [1, 1, 0]]


def test_standard_input_is_not_tokenized(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="standard input can be read only once; save it to a file"):
        load(find(Path("-")), tokenizer)


# ---- Views --------------------------------------------------------------------------------------------------------------


def test_selected_rows_are_those_of_the_table(table: TokenTable) -> None:
    whole, rows = contents(table), [30, 2, 2, 0, len(table) - 1]
    chosen = table.select(rows)
    assert contents(chosen) == [whole[row] for row in rows]
    assert contents(chosen.select([4, 1])) == [whole[rows[4]], whole[rows[1]]]
    assert contents(chosen, [3, 0]) == [whole[rows[3]], whole[rows[0]]]
    second = table.select(rows, columns=[1])
    assert second.arity == 1
    assert second.texts() == (table.texts(rows)[1],)
    assert len(table.select([])) == 0
    assert table.select([]).texts() == ([], [])
    assert table.select([]).lengths().shape == (0, 2)


def test_chained_tables_are_one_after_the_other(table: TokenTable) -> None:
    parts = [table.select([5, 1]), table.select([]), table, table.select([7])]
    chained = chain("both", parts)
    assert contents(chained) == [row for part in parts for row in contents(part)]
    assert contents(chained.select([1, len(chained) - 1, 4])) == [
        contents(chained)[row] for row in (1, len(chained) - 1, 4)
    ]
    for row in (-1, len(chained)):
        with pytest.raises(IndexError):
            chained.locate(row)
    assert chained.bad_rows == table.bad_rows  # each file's once
    assert chained.skipped == table.skipped


def test_views_give_the_same_batches_and_copy_no_word_ids(table: TokenTable) -> None:
    rows = np.arange(1, len(table), 2)
    view = chain("x", [table.select(rows), table])
    some = np.array([3, 0, len(rows) + 1])
    ours = Collator({"x": view}, 12, {"x": "both"})({"x": some})
    theirs = Collator({"x": table}, 12, {"x": "both"})({"x": np.array([rows[3], rows[0], 1])})
    assert ours.packed.tokens.tolist() == theirs.packed.tokens.tolist()
    assert ours.labels["x"].tolist() == theirs.labels["x"].tolist()
    assert np.shares_memory(view.columns[0][0], table.columns[0][int(rows[0])])
    assert view.lengths("both").tolist() == [*table.lengths("both")[rows].tolist(), *table.lengths("both").tolist()]
    assert view.count_truncated(5) == int((view.lengths() > 5).any(axis=1).sum())


def test_tables_of_different_kinds_are_not_chained(table: TokenTable) -> None:
    with pytest.raises(ValueError, match="2 and 1 texts an example"):
        chain("x", [table, table.select(columns=[0])])
    with pytest.raises(ValueError, match="different kinds of labels"):
        chain("x", [table, replace(table, labels=None)])


def test_corpora_have_the_texts_of_their_tables(table: TokenTable) -> None:
    sentences = collect_sentences("mlm", [table, table.select([1], columns=[1])])
    assert sentences.labels is None
    assert sentences.texts() == ([*table.texts()[0], *table.texts()[1], table.texts()[1][1]],)
    assert collect_pairs("nsp", [table]).texts() == table.texts()


def test_texts_of_a_changed_file_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", 20)
    table = load(find(path), tokenizer, cache_dir=tmp_path / "cache")
    assert table.texts([0])[1] == ["row 0"]
    path.write_text("\n".join(["", *path.read_text().splitlines()]))
    with pytest.raises(DataError, match=r"x\.jsonl: changed since it was tokenized"):
        table.texts([0])
    unknown = TokenTable("x", Path("x"), (Tokens.of([[1]]),), None, Text.of(["1"]), np.array([1]), (), "")
    with pytest.raises(ValueError, match="the texts of this table were not kept"):
        unknown.texts()


# ---- A held-out tenth ---------------------------------------------------------------------------------------------------


def labelled(labels: Sequence[Any] | None, dtype: str = "int64") -> TokenTable:
    count = 100 if labels is None else len(labels)
    array = None if labels is None else np.array(labels, dtype)
    return TokenTable("x", Path("x"), (), array, Text.of([]), np.arange(count), (), "")


@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_each_class_is_held_out_in_proportion_and_keeps_a_row(dtype: str) -> None:
    labels = [0] * 700 + [1] * 250 + [2] * 49 + [3]
    table = labelled(labels, dtype)
    train, dev = hold_out(table, 0.1, seed=3)
    assert sorted([*train.tolist(), *dev.tolist()]) == list(range(1000))
    assert train.tolist() == sorted(train.tolist())
    assert dev.tolist() == sorted(dev.tolist())
    counts = np.bincount(np.array(labels)[dev], minlength=4)
    assert counts.sum() == 100
    assert np.abs(counts - [70, 25, 5, 0]).max() <= 1
    assert counts[3] == 0


def test_a_split_depends_on_the_seed_alone_and_is_spread_over_the_rows() -> None:
    table = labelled(None)
    once, again, other = (hold_out(table, 0.2, seed)[1] for seed in (1, 1, 2))
    assert once.tolist() == again.tolist() != other.tolist()
    assert len(once) == 20
    held = np.concatenate([hold_out(table, 0.2, seed)[1] for seed in range(300)])
    assert np.bincount(held, minlength=100).min() > 35
    assert np.bincount(held, minlength=100).max() < 90


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0.5 * i for i in range(20)], 2), ([[1, 0]] * 20, 2), ([5], 0), ([], 0), ([1, 1], 1), (list(range(20)), 2)],
)
def test_labels_that_are_no_classes_and_tiny_sets_are_split_too(labels: list[Any], expected: int) -> None:
    train, dev = hold_out(labelled(labels, "float32"))
    assert len(dev) == expected
    assert len(train) + len(dev) == len(labels)


def test_a_large_share_leaves_rows_to_train_on() -> None:
    train, _ = hold_out(labelled([0] * 20 + [1], "float32"), 0.9)
    assert 20 in train, "the only row of its class"
    assert len(hold_out(labelled([0.5, 1.5, 2.5], "float32"), 0.9)[0]) == 1


def test_a_share_of_nothing_or_all_is_refused() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="expected 0 < share < 1"):
            hold_out(labelled(None), share)


def test_hashes_are_alike_for_equal_items_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [[int(c) for c in word] for word in ("12", "", "21", "12", "1200", "120", "0", "", "00", "12")]
    whole = Tokens.of(items)
    same = np.array([[a == b for b in items] for a in items])
    for wide in (whole, Tokens(whole.flat.astype(np.uint16), whole.offsets)):
        assert np.array_equal(wide.hashes[:, None] == whole.hashes, same)
    hashes = whole.hashes
    monkeypatch.setattr("minbert_fast.data.sentences.HASHED_AT_ONCE", 3)
    assert np.array_equal(whole.hashes, hashes)
    rows = np.array([9, 1, 5])
    views = Chained((Selected(whole, rows), whole), [0, 3, 13])
    assert np.array_equal(views.hashes, np.concatenate([whole.hashes[rows], whole.hashes]))
