# SPDX-License-Identifier: Apache-2.0
"""Mutated data and tokenizer files are either parsed or refused with one line; no row is lost silently."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.files import Table
from minbert_fast.data.formats import FORMATS, Layout
from minbert_fast.data.messages import DataError

pytestmark = pytest.mark.ci

TASKS = ("sentiment", "paraphrase", "similarity", "triplets")
ROWS = 25


def base_file(task: str, random_: random.Random) -> bytes:
    """A valid file with quotes, doubled quotes and line breaks."""
    layout = FORMATS[task]
    rows = []
    for index in range(ROWS):
        texts = [f"sentence {index} of {random_.choice(['joy', 'a, b', 'x'])}" for _ in layout.texts]
        if index % 4 == 0:
            texts[0] = random_.choice(['he said "hi"', "two\nlines", '"', "tab\there", "", "é 😀"])
        label = [str(index % 2)] if layout.label else []
        rows.append([str(index), *([f"id{index}"] if layout.id else []), *texts, *label])
    header = ["", *((layout.id,) if layout.id else ()), *layout.texts, *layout.label]
    lines = []
    for row in [header, *rows]:
        quoted = [f'"{f.replace(chr(34), 2 * chr(34))}"' if any(c in f for c in '"\t\n,') else f for f in row]
        lines.append(layout.separator.join(quoted))
    return ("\n".join(lines) + "\n").encode()


def at(data: bytes, random_: random.Random) -> int:
    return random_.randrange(len(data) + 1)


def insert(piece: bytes) -> Callable[[bytes, random.Random], bytes]:
    def mutation(data: bytes, random_: random.Random) -> bytes:
        place = at(data, random_)
        return data[:place] + piece + data[place:]

    return mutation


def truncate(data: bytes, random_: random.Random) -> bytes:
    return data[: at(data, random_)]


def drop_span(data: bytes, random_: random.Random) -> bytes:
    place = at(data, random_)
    return data[:place] + data[place + random_.randrange(40) :]


def flip_byte(data: bytes, random_: random.Random) -> bytes:
    if not data:
        return data
    place = random_.randrange(len(data))
    return data[:place] + bytes([random_.randrange(256)]) + data[place + 1 :]


def shuffle_columns(data: bytes, random_: random.Random) -> bytes:
    lines = data.split(b"\n")
    order = list(range(5))
    random_.shuffle(order)
    cells = [line.split(b"\t") for line in lines]
    return b"\n".join(b"\t".join(row[i] for i in order if i < len(row)) for row in cells)


def shuffle_lines(data: bytes, random_: random.Random) -> bytes:
    lines = data.split(b"\n")
    random_.shuffle(lines)
    return b"\n".join(lines)


def repeat_span(data: bytes, random_: random.Random) -> bytes:
    begin, end = sorted((at(data, random_), at(data, random_)))
    return data[:end] + data[begin:end] * random_.randrange(1, 4) + data[end:]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncate,
    drop_span,
    flip_byte,
    shuffle_columns,
    shuffle_lines,
    repeat_span,
    *(insert(piece) for piece in (b'"', b'""', b"\t", b"\n", b"\r\n", b"\r", b"\0", b"\xff\xfe", b"\xef\xbb\xbf")),
    *(insert(piece) for piece in (b"\xc3", b"\xed\xa0\x80", b"nan", b"-", b"9" * 400, b"x" * 5000, b'"\n"', b"\t\t\t")),
    lambda data, _: data.replace(b"\n", b"\r\n"),
    lambda data, _: data.replace(b'"', b""),
    lambda data, _: data.decode("utf-8", "replace").encode("utf-16"),
)


def check_message(error: DataError, place: Path) -> None:
    """The message is one line that starts with the place."""
    assert "\n" not in str(error)
    assert str(error).startswith(str(place))


def check(path: Path, task: str) -> bool:
    """Reads a file and checks the result; True if the file was accepted."""
    try:
        table = read_table(path, task, max_bad_rows=0.5)
    except DataError as error:
        check_message(error, path)
        return False
    assert table.rows_read == len(table) + len(table.bad_rows)
    assert all(len(column) == len(table) for column in (*table.sentences, table.ids))
    if table.labels is not None:
        assert len(table.labels) == len(table)
        assert ((table.labels >= 0) & (table.labels <= 5)).all()
    starts = sorted([*table.lines.tolist(), *(bad.line for bad in table.bad_rows)])
    assert len(set(starts)) == len(starts), "a line was counted twice"
    if FORMATS[task].quoting == "csv":
        check_against_csv(path, FORMATS[task], table, starts)
        return True
    lines = path.read_bytes().split(b"\n")
    for start, following in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        between = [line for line in lines[start : following - 1] if line not in (b"", b"\r")]
        if between:  # lines on which no row begins: they continue a quoted field, and Python's csv reader agrees
            text = b"\n".join(line.removesuffix(b"\r") for line in lines[start - 1 : following - 1])
            record = text.decode().rstrip("\n").replace("\r", " ")  # our reader treats a lone CR as a space
            assert len(list(csv.reader([record], delimiter=FORMATS[task].separator, strict=True))) == 1
    before = [line for line in lines[: starts[0] - 1] if line.removeprefix(b"\xef\xbb\xbf") not in (b"", b"\r")]
    assert len(before) == 1, "between the header and the first row stands a line that nobody counted"
    return True


def check_against_csv(path: Path, layout: Layout, table: Table, starts: list[int]) -> None:
    """Every row that Python's csv finds was used or reported, in order, and the texts of the used ones are the same."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        header, *rows = filter(None, csv.reader(file, delimiter=layout.separator))
    assert len(rows) == len(starts)
    columns = [[name.strip() for name in header].index(name) for name in layout.texts]
    used = [row for row, start in zip(rows, starts, strict=True) if start in set(table.lines.tolist())]
    assert [tuple(row[column] for column in columns) for row in used] == list(zip(*table.sentences, strict=True))


Source = Callable[[str, random.Random], bytes]


def fuzz(folder: Path, count: int, seed: int, source: Source = base_file) -> None:
    random_ = random.Random(seed)
    path = folder / "mutated.csv"
    used = 0
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        data = source(task, random_)
        for _ in range(random_.randrange(1, 4)):
            data = random_.choice(MUTATIONS)(data, random_)
        path.write_bytes(data)
        try:
            used += check(path, task)
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}, task {task}: {data!r}") from error
    assert count // 10 < used < count, "the mutations are too gentle or too harsh to show anything"


@pytest.mark.parametrize("task", TASKS)
def test_unmutated_files_are_clean(tmp_path: Path, task: str) -> None:
    path = tmp_path / "clean.csv"
    path.write_bytes(base_file(task, random.Random(0)))
    table = read_table(path, task, max_bad_rows=0.0)
    assert len(table) == ROWS


def test_mutated_data_files(tmp_path: Path) -> None:
    fuzz(tmp_path, 600, seed=1)


@pytest.mark.slow
def test_mutated_data_files_by_the_thousand(tmp_path: Path) -> None:
    fuzz(tmp_path, 10_000, seed=2)


@pytest.mark.slow
def test_mutated_real_data_files_by_the_thousand(tmp_path: Path, shared_data: Path) -> None:
    lines = {t: (shared_data / f"{FORMATS[t].stem}-train.csv").read_bytes().splitlines(keepends=True) for t in TASKS}

    def real(task: str, random_: random.Random) -> bytes:
        """The header and some rows of the task's real file."""
        header, *rows = lines[task]
        return b"".join([header, *random_.sample(rows, ROWS)])

    fuzz(tmp_path, 10_000, seed=3, source=real)


def mutate_json(value: object, random_: random.Random) -> object:
    """The value with one node replaced, dropped or renamed."""
    if isinstance(value, dict) and value and random_.random() < 0.85:
        key = random_.choice(list(value))
        kind = random_.randrange(8)
        copy = dict(value)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[key + "x"] = copy.pop(key)
        else:
            copy[key] = mutate_json(value[key], random_)
        return copy
    if isinstance(value, list) and value and random_.random() < 0.85:
        index = random_.randrange(len(value))
        return [*value[:index], mutate_json(value[index], random_), *value[index + 1 :]]
    return random_.choice([None, True, -1, 0, 1 << 40, 1e300, "", "[UNK]", "\0", "é" * 1000, [], {}, [[]], {"id": -1}])


def fuzz_tokenizer(folder: Path, count: int, seed: int) -> None:
    random_ = random.Random(seed)
    model = sample_directory().model
    names = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
    original = {name: (model / name).read_bytes() for name in names}
    used = 0
    for number in range(count):
        files = dict(original)
        if number % 3 == 0:
            del files["tokenizer.json"]
        name = random_.choice(list(files))
        if name.endswith(".json") and random_.random() < 0.7:
            files[name] = json.dumps(mutate_json(json.loads(files[name]), random_)).encode()
        else:
            files[name] = random_.choice(MUTATIONS)(files[name], random_)
        for old in names:
            (folder / old).unlink(missing_ok=True)
        for new, content in files.items():
            (folder / new).write_bytes(content)
        try:
            tokens = Tokenizer.from_pretrained(folder).encode(["the plot is good", "", "😀 xyzzy"])
        except DataError as error:
            check_message(error, folder)
        except BaseException as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {files[name]!r}") from error
        else:
            used += 1
            assert len(tokens) == 3
    assert count // 10 < used < count


def test_mutated_tokenizer_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzz_tokenizer(tmp_path, 300, seed=1)
    assert capfd.readouterr().err == "", "Rust panicked"


@pytest.mark.slow
def test_mutated_tokenizer_files_by_the_thousand(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzz_tokenizer(tmp_path, 10_000, seed=2)
    assert capfd.readouterr().err == "", "Rust panicked"
