# SPDX-License-Identifier: Apache-2.0
"""The token cache: the same rows as the file, rebuilt after any change, complete or absent, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minbert_fast.data import Tokenizer, cache_entries, read_table, sample_directory
from minbert_fast.data.cache import default_cache_dir, load_tokens, tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.files import TableReader
from minbert_fast.data.formats import FORMATS, Layout, Quoting
from minbert_fast.data.inputs import file_input
from minbert_fast.data.messages import DataError
from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokens import TokenTable
from tests.large_data import write_rows

TEXTS = ("a good film", "", "😀 bad", 'he said "no"', "word " * 300)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(sample_directory().model)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of pairs with one bad row."""
    rows = [f"{i}\tid{i}\t{TEXTS[i % 5].replace(chr(34), '')}\t{TEXTS[i % 3]}\t{i % 2}\n" for i in range(40)]
    path = tmp_path / "quora-train.csv"
    path.write_text("\tid\tsentence1\tsentence2\tis_duplicate\n" + "".join(rows) + "40\tid40\ta\tb\t7\n")
    return path


def load_rows(source: Path, tokenizer: Tokenizer, layout: str | Layout = "paraphrase", **more: Any) -> TokenTable:
    found = file_input(source, layout)
    return load_tokens(found, found.layout.rule, tokenizer, max_bad_rows=0.1, **more)


def load(source: Path, tokenizer: Tokenizer, **more: Any) -> tuple[TokenTable, bool]:
    """The table, and whether it was built (True) or read from the cache."""
    built: list[int] = []
    folder = more.pop("cache_dir", source.parent / "cache")
    table = load_rows(source, tokenizer, cache_dir=folder, progress=lambda *n: built.append(n[0]), **more)
    return table, bool(built)


def contents(table: TokenTable) -> list[Any]:
    columns = [array.tolist() for column in table.columns for array in (column.flat, column.offsets)]
    labels = None if table.labels is None else table.labels.tolist()
    ids = [table.ids[row] for row in range(len(table))]
    return [*columns, labels, ids, table.lines.tolist(), [str(bad) for bad in table.bad_rows]]


def entries(source: Path) -> list[Path]:
    return sorted((source.parent / "cache").iterdir())


# ---- The same rows as the file ------------------------------------------------------------------------------------------


def test_built_cached_and_in_memory_tables_are_equal(source: Path, tokenizer: Tokenizer) -> None:
    built, was_built = load(source, tokenizer)
    cached, again = load(source, tokenizer)
    assert (was_built, again) == (True, False)
    direct = tokenize_table(read_table(source, "paraphrase", max_bad_rows=0.1), tokenizer)
    assert contents(built) == contents(cached) == contents(direct)
    assert len(built) == 40
    assert [bad.line for bad in built.bad_rows] == [42]
    assert built.locate(3) == f"{source}:5"
    for row, text in enumerate(read_table(source, "paraphrase", max_bad_rows=0.1).sentences[0]):
        assert cached.columns[0][row].tolist() == tokenizer.encode([text])[0].tolist()


def test_word_ids_above_65535_are_kept(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A multilingual BERT has 119,547 words: two bytes hold fewer."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["model"]["vocab"]["good"] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(file))
    large = Tokenizer.from_pretrained(folder)
    built, cached = (load(source, large)[0] for _ in range(2))
    for table in (built, cached):
        assert table.columns[0][0].tolist() == large.encode([TEXTS[0]])[0].tolist()
        assert 70_000 in table.columns[0][0].tolist()


def test_lengths_of_separate_and_joint_sequences(source: Path, tokenizer: Tokenizer) -> None:
    table, _ = load(source, tokenizer)
    first, second = ([len(sentence) for sentence in column] for column in table.columns)
    assert table.lengths().tolist() == [list(pair) for pair in zip(first, second, strict=True)]
    assert table.lengths("cross").tolist() == [[a + b - 1] for a, b in zip(first, second, strict=True)]
    assert table.lengths("both").tolist() == [[a, b, a + b - 1] for a, b in zip(first, second, strict=True)]
    assert table.count_truncated(4) == sum(a > 4 or b > 4 for a, b in zip(first, second, strict=True))


def test_chunks_of_any_size_give_the_same_entry(
    source: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = load(source, tokenizer)
    monkeypatch.setattr(TableReader.chunks, "__defaults__", (3,))
    pieces, built = load(source, tokenizer, cache_dir=source.parent / "other")
    assert built
    assert contents(pieces) == contents(whole)


# ---- Rebuilt after any change -------------------------------------------------------------------------------------------


def test_a_changed_source_is_read_again(source: Path, tokenizer: Tokenizer) -> None:
    before, _ = load(source, tokenizer)
    status = source.stat()
    text = source.read_text().replace("bad", "odd", 1)
    source.write_text(text)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))  # the key is the content, not the time
    after, built = load(source, tokenizer)
    assert built
    assert contents(after) != contents(before)
    assert after.source_hash != before.source_hash


def test_another_tokenizer_gets_another_entry(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    load(source, tokenizer)
    other = tmp_path / "tokenizer"
    other.mkdir()
    tokenizer.save(other)
    words = (other / "vocab.txt").read_text().splitlines()
    (other / "tokenizer.json").unlink()
    (other / "vocab.txt").write_text("\n".join([*words, "good"]) + "\n")
    assert load(source, Tokenizer.from_pretrained(other))[1]
    assert len(entries(source)) == 2


def test_another_way_to_read_a_file_gets_another_entry(source: Path, tokenizer: Tokenizer) -> None:
    """The columns, the rule of the labels, and whether labels are read."""
    layout = FORMATS["paraphrase"]
    rule = layout.rule
    assert rule is not None
    swapped = replace(layout, texts=layout.texts[::-1])
    inputs = [(file_input(str(source), each), rule) for each in (layout, swapped)]
    inputs += [(inputs[0][0], None), (inputs[0][0], replace(rule, high=7))]
    expected = []
    for cached in (False, True):
        for number, (found, labels) in enumerate(inputs):
            folder = source.parent / ("cache" if cached else f"alone-{number}")
            table = load_tokens(found, labels, tokenizer, max_bad_rows=0.1, cache_dir=folder)
            if cached:
                assert contents(table) == expected[number], number
            else:
                expected.append(contents(table))
    assert len(entries(source)) == len(inputs)


def test_bad_rows_of_a_cached_file_are_judged_again(source: Path, tokenizer: Tokenizer) -> None:
    """A run that tolerates many of them leaves an entry, which another run with the usual limit finds."""
    load(source, tokenizer)
    rule = file_input(source, "paraphrase").layout.rule
    with pytest.raises(DataError, match=r"1 of 41 rows are bad \(2\.4%; fewer than 1\.0% are tolerated\)"):
        load_tokens(file_input(source, "paraphrase"), rule, tokenizer, cache_dir=source.parent / "cache")


def test_a_relative_cache_directory_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "minbert_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "minbert_fast"


def test_a_source_that_changes_while_it_is_read_is_refused(source: Path, tokenizer: Tokenizer) -> None:
    def touch(rows: int, done: int, size: int) -> None:
        source.write_text(source.read_text() + "41\tid41\ta\tb\t1\n")

    with pytest.raises(DataError, match="changed while it was read"):
        load_rows(source, tokenizer, cache_dir=source.parent / "c", progress=touch)


# ---- Complete or absent -------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_is_detected_and_repaired(source: Path, tokenizer: Tokenizer) -> None:
    whole, _ = load(source, tokenizer)
    expected = contents(whole)
    (entry,) = entries(source)
    for path in sorted(entry.iterdir()):
        content = path.read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        for damaged in (None, b"", content[:-1], flipped, content + b"\0"):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if path.name == "meta.json" and damaged in (content[:-1], content + b"\0"):
                path.write_bytes(
                    b"[" * 100_000 if damaged in content else content.replace(b'"skipped": 0', b'"skipped": 7')
                )
            found, built = load(source, tokenizer)
            assert built, (path.name, damaged)
            assert contents(found) == expected
            assert entries(source) == [entry]
            assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["absent permission", "full disk"])
def test_without_room_for_a_cache_the_tokens_stay_in_memory(
    source: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole, _ = load(source, tokenizer, cache_dir=source.parent / "other")
    said: list[str] = []
    if kind == "full disk":

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    else:
        (source.parent / "cache").write_text("a file where the folder should be")
    table, _ = load(source, tokenizer, notify=said.append)
    assert contents(table) == contents(whole)
    assert [line for line in said if "the tokens stay in memory" in line] == said != []
    if kind == "full disk":
        assert entries(source) == []


def test_unfinished_entries_of_killed_processes_are_deleted(source: Path, tokenizer: Tokenizer) -> None:
    load(source, tokenizer)
    (entry,) = entries(source)
    old, new = (entry.with_name(f".{entry.name}.{pid}.tmp") for pid in ("1", "2"))
    for left in (old, new):
        left.mkdir()
    os.utime(old, (0, 0))
    (entry / "lines").unlink()
    load(source, tokenizer)
    assert entries(source) == [new, entry]


def test_entries_not_opened_for_a_month_are_deleted(source: Path, tokenizer: Tokenizer) -> None:
    """Only cache entries are deleted; other files in the folder stay."""
    before, now = (time.time() - days * 86_400 for days in (31, 29))
    load(source, tokenizer)
    (used,) = entries(source)
    foreign = used.with_name("notes")
    unused, recent = (used.with_name(f"{stem}-{'0' * 31}{digit}") for digit, stem in enumerate(("sts_train", "")))
    left = used.with_name(f".gone-{'1' * 32}.7.tmp")
    for path, age in ((foreign, before), (unused, before), (recent, now), (left, before), (used, before)):
        path.mkdir(exist_ok=True)
        os.utime(path, (age, age))
    _, built = load(source, tokenizer)  # opened: counts as used from now on
    assert not built
    assert {unused, left} <= set(used.parent.iterdir())
    source.write_text(source.read_text().replace("a good film", "a bad film"))
    _, built = load(source, tokenizer)
    assert built
    names = set(used.parent.iterdir())
    assert names > {foreign, recent, used}
    assert not names & {unused, left}
    assert len(names) == 4


def test_two_processes_at_once_leave_one_entry(source: Path, tokenizer: Tokenizer) -> None:
    """Each builds in a separate folder, and the last one finds the entry there. Threads stand for processes of two
    containers, which share a process id: one deleted what the other had begun."""
    expected = contents(load(source, tokenizer, cache_dir=source.parent / "other")[0])
    both = threading.Barrier(2)
    found: list[list[Any]] = []

    def work(number: int) -> None:
        table = load_rows(source, tokenizer, cache_dir=source.parent / "cache", progress=wait)
        found.append(contents(table))

    def wait(rows: int, done: int, size: int) -> None:
        both.wait(timeout=30)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 2
    assert len(entries(source)) == 1


def test_another_process_publishes_the_entry_first(
    source: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other entry appears just before ours is renamed: no error, and no notice."""
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if not target.exists():
            shutil.copytree(path, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    notices: list[str] = []
    folder = source.parent / "cache"
    table = load_rows(source, tokenizer, cache_dir=folder, notify=notices.append)
    monkeypatch.undo()
    assert contents(table) == contents(load(source, tokenizer, cache_dir=source.parent / "other")[0])
    assert not notices
    assert [path.name.startswith(".") for path in folder.iterdir()] == [False]


# ---- In bounded memory --------------------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.parametrize("quoting", ["course", "csv"])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, quoting: Quoting
) -> None:
    """Building and reading; tests/large_data.py measures a whole run on millions of rows."""
    monkeypatch.setattr(TableReader.chunks, "__defaults__", (128,))
    monkeypatch.setattr(cache_entries, "BLOCK", cache_entries.BLOCK // 256)
    layout = replace(FORMATS["paraphrase"], quoting=quoting)
    peaks = {}
    for rows in (2_000, 16_000):
        path = tmp_path / f"{rows}.csv"
        write_rows(path, rows)
        for stage in ("build", "open"):
            tracemalloc.start()
            try:
                table = load_rows(path, tokenizer, layout, cache_dir=tmp_path / "cache")
                peaks[stage, rows] = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert len(table) == rows
    for stage in ("build", "open"):
        assert peaks[stage, 16_000] < 1.2 * peaks[stage, 2_000] + 20_000, peaks


def test_progress_reaches_the_end_of_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, 9_000, longest=2)
    seen: list[tuple[int, int, int]] = []
    load_rows(path, tokenizer, cache_dir=tmp_path / "cache", progress=lambda *n: seen.append(n))
    assert seen == sorted(seen)
    assert seen[-1] == (9_000, path.stat().st_size, path.stat().st_size)
    assert len(seen) == 2


def test_a_sampler_keeps_four_bytes_a_row_and_loses_none() -> None:
    rows = 50_000
    table = TokenTable("x", Path(), (), None, None, np.arange(rows), (), "")  # type: ignore[arg-type]
    sampler = Sampler.from_tables({"x": table}, 1_000, seed=3)
    tracemalloc.start()
    try:
        drawn = np.concatenate([sampler.rows(step)["x"] for step in range(sampler.steps_per_epoch)])
        kept = tracemalloc.get_traced_memory()[0] - drawn.nbytes
    finally:
        tracemalloc.stop()
    assert sorted(drawn.tolist()) == list(range(rows))
    assert drawn.dtype == np.int64
    assert kept < 5 * rows


def test_batches_read_from_the_memory_map(source: Path, tokenizer: Tokenizer) -> None:
    load(source, tokenizer)
    table, _ = load(source, tokenizer)
    assert not table.columns[0].flat.flags.owndata
    assert not table.columns[0].flat.flags.writeable
    batch = Collator({"paraphrase": table}, 16)({"paraphrase": np.array([4, 0])})
    assert batch.packed.cu_seqlens.diff().tolist()[:2] == [min(16, len(table.columns[0][row])) for row in (4, 0)]
