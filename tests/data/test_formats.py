# SPDX-License-Identifier: Apache-2.0
"""Data files of every format: the same rows as other libraries read, bad rows with their lines, published layouts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minbert_fast.common.schema import ConfigError
from minbert_fast.data.files import Table, TableReader, read_rows
from minbert_fast.data.formats import FORMATS, Layout
from minbert_fast.data.inputs import Input, find_input, layout_of
from minbert_fast.data.label_summary import LabelSummary, merge_summaries, summarise_labels
from minbert_fast.data.labels import Classes, ClassSets, Numbers, Rule
from minbert_fast.data.messages import DataError
from minbert_fast.data.sentence_files import read_sentences
from minbert_fast.data.source import Source, sources_of

GRADES = Classes(("bad", "fair", "good"))
TEXTS = [
    'a, "quoted" film',
    "two\nlines, and a comma",
    "CR\rand CRLF\r\nhere",
    "",
    'ends in "',
    "é 😀\u2028\x85",
    "\ttab",
]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def find(path: Path, texts: int = 1, **keys: Any) -> Input:
    found = find_input(Source(train=str(path), **keys), "train", texts)
    assert found is not None
    return found


def read(path: Path, rule: Rule | None = None, texts: int = 1, bad: float = 1.0, **keys: Any) -> Table:
    return read_rows(find(path, texts, **keys), rule, max_bad_rows=bad)


def problems(table: Table) -> list[str]:
    """The bad rows without the folder."""
    return [str(bad).rpartition("/")[2] for bad in table.bad_rows]


def refused(path: Path, rule: Rule | None = None, texts: int = 1, **keys: Any) -> str:
    """The message, one line, of the error when the file is read; without the folder."""
    with pytest.raises(DataError) as caught:
        read(path, rule, texts, bad=0.5, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


def numbers(table: Table) -> list[Any]:
    assert table.labels is not None
    return list(table.labels.tolist())


# ---- CSV and TSV --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "separator"), [("x.csv", ","), ("x.tsv", "\t"), ("x.csv", "\t"), ("x.csv", ";")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quoted_fields_are_read_as_python_and_pandas_read_them(
    tmp_path: Path, name: str, separator: str, end: str
) -> None:
    """With a comma and a line break in one field, too, which the course's reader splits into two rows."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator=end)
    writer.writerows([["n", "body", "grade"], *([i, text, GRADES.names[i % 3]] for i, text in enumerate(TEXTS))])
    path = write(tmp_path, name, out.getvalue())
    table = read(path, GRADES, text="body", label="grade", id="n")
    assert table.sentences == (TEXTS,)
    assert table.ids == [str(i) for i in range(len(TEXTS))]
    assert numbers(table) == [i % 3 for i in range(len(TEXTS))]
    assert table.bad_rows == ()
    frame = pandas.read_csv(path, sep=separator, keep_default_na=False, lineterminator=None, engine="python")
    assert [text.replace("\r\n", "\n").replace("\r", "\n") for text in table.sentences[0]] == [
        text.replace("\r\n", "\n").replace("\r", "\n") for text in frame["body"]
    ]


@pytest.mark.parametrize("quoting", ["csv", "none"])
def test_a_header_may_follow_a_blank_line_and_have_spaces_and_commas(tmp_path: Path, quoting: Any) -> None:
    path = write(tmp_path, "X.CSV", "\r\n text \t grade, at last\r\na, b\tbad\r\n")
    table = read(path, GRADES, label="grade, at last", quoting=quoting)
    assert table.sentences == (["a, b"],)
    assert numbers(table) == [0]


@pytest.mark.parametrize("quoting", ["csv", "none", "course"])
def test_the_header_line_again_is_no_row(tmp_path: Path, quoting: Any) -> None:
    """Files joined with their headers: `label` was a class."""
    path = write(tmp_path, "x.csv", "text,label\na,bad\ntext,label\nb,good\ntext,fair\n")
    layout = Layout("own", ("text",), ("label",), separator=",", quoting=quoting)
    table = read_rows(Input("x.csv", layout, 1, (path,)), GRADES, max_bad_rows=1.0)
    assert table.sentences == (["a", "b", "text"],)
    assert problems(table) == ["x.csv:3: the header line again, expected data"]
    lone = write(tmp_path, "y.csv", "text\na\ntext\n")
    assert read(lone).sentences == (["a", "text"],)


def test_line_numbers_are_those_where_rows_begin(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", '\ntext,label\n"a\n\nb,c",bad\n\nx,poor\n"d\r\ne",good\ny,fair\n')
    table = read(path, GRADES)
    assert table.lines.tolist() == [3, 8, 10]
    assert table.sentences == (["a\n\nb,c", "d\r\ne", "y"],)
    assert problems(table) == ["x.csv:7: label 'poor' is not one of the 3 classes (bad, fair, good)"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text('ab" ,\t\n\ré😀', max_size=6), min_size=2, max_size=2), min_size=1, max_size=5))
def test_reading_inverts_the_csv_writer(tmp_path: Path, rows: list[list[str]]) -> None:
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["sentence1", "sentence2"], *rows])
    assert list(zip(*read(tmp_path / "x.csv", texts=2).sentences, strict=True)) == [tuple(row) for row in rows]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text('ab",\n\r', max_size=20))
def test_rows_are_those_of_the_csv_module(tmp_path: Path, text: str) -> None:
    """Any text: as many rows as the module finds, each used or reported; a quote that stays open is an error."""
    write(tmp_path, "x.csv", "text,b\n" + text)
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    last = list(csv.reader(io.StringIO(text + "\nlast", newline="")))[-1]
    problem = ""
    try:
        table = read(tmp_path / "x.csv")
    except DataError as error:
        problem = str(error)
    if last != ["last"]:
        assert "a quote is opened and never closed" in problem
    elif problem:
        assert not rows or "rows are bad" in problem
    else:
        starts = sorted([*table.lines.tolist(), *(bad.line for bad in table.bad_rows)])
        used = [row[0] for row, line in zip(rows, starts, strict=True) if line in table.lines]
        assert used == table.sentences[0]


def test_an_open_quote_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", 'text,label\na,bad\n"open,good\n' + "more,fair\n" * 5)
    hint = 'if quotes are ordinary characters in this file, set quoting = "none"'
    expected = f"x.csv:3: a quote is opened and never closed: '\"open,good'; {hint}"
    assert refused(path, GRADES) == expected
    for row in (b'"open"x,"good', b'"open\xe9,good'):  # another fault does not hide it
        masked = write(tmp_path, "y.csv", b"text,label\na,bad\n" + row + b"\n" + b"more,fair\n" * 5)
        assert refused(masked, GRADES).startswith("y.csv:3: a quote is opened and never closed: ")
    assert read(path, GRADES, quoting="none").sentences[0][1] == '"open'
    long = write(tmp_path, "long.csv", 'text,label\na,bad\n"open,good\n' + "more,fair\n" * 200_000)
    assert refused(long, GRADES) == expected.replace("x.csv", "long.csv")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"a", "1 fields, expected 2"),
        (b"a,bad,x", "3 fields, expected 2"),
        (b"a,", "label '' is not one of the 3 classes (bad, fair, good)"),
        (b'"a"b,bad', "text after a closing quote (quotes in a quoted field are doubled): '\"a\"b,bad'"),
        (b"caf\xe9,bad", "byte 0xe9 at offset 3 is not UTF-8"),
        (b'"a\nca\xe9,"",\n",bad', "byte 0xe9 at offset 2 is not UTF-8"),
        (b"te\0xt,bad", "NUL character at offset 2"),
        (b"x" * (1 << 20) + b",bad", "a line of 1,048,581 bytes, expected at most 1,048,576"),
    ],
)
def test_a_bad_row_is_reported_and_no_other_is_lost(tmp_path: Path, row: bytes, reason: str) -> None:
    path = write(tmp_path, "x.csv", b"text,label\nfirst,good\n" + row + b"\nlast,fair\n")
    for quoting in ("csv", "none") if b'"' not in row else ("csv",):
        table = read(path, GRADES, quoting=quoting)
        assert table.sentences == (["first", "last"],)
        assert problems(table) == [f"x.csv:3: {reason}"]


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        (b"", {}, "x.csv: empty file"),
        (b"\n\r\n", {}, "x.csv: empty file"),
        (b"text,label\n", {}, "x.csv: no rows after the header"),
        ("text,label\na,bad\n".encode("utf-16"), {}, "x.csv:1: UTF-16 text, expected UTF-8"),
        (
            b"body,stars\na,bad\n",
            {},
            "x.csv:1: no text columns; expected comma-separated columns text, or sentence, or name them (text = ...), "
            "found 'body,stars'",
        ),
        (
            b"body,stars\na,bad\n",
            {"text": "body"},
            "x.csv:1: no column 'label'; expected comma-separated columns body, label, found 'body,stars'",
        ),
        (
            b"text,label,text\na,bad,b\n",
            {},
            "x.csv:1: more than one column 'text'; expected comma-separated columns text, label, found 'text,label,text'",
        ),
        (b"text\tlabel\na\tbad\n", {"separator": ","}, "x.csv:1: no text columns; expected comma-separated"),
    ],
)
def test_an_unusable_file_is_one_line(tmp_path: Path, content: bytes, keys: Mapping[str, Any], message: str) -> None:
    assert refused(write(tmp_path, "x.csv", content), GRADES, **keys).startswith(message)


@pytest.mark.parametrize("separator", ['"', "\n", "\r", "\0", ", "])
def test_a_separator_that_cannot_divide_fields_is_refused(separator: str) -> None:
    with pytest.raises(ConfigError, match=r"separator = .*: expected a character"):
        Source(train="x.csv", separator=separator)


def test_a_separator_of_three_characters_needs_quotes_to_be_text(tmp_path: Path) -> None:
    """It ended in a TypeError of the csv module."""
    path = write(tmp_path, "x.csv", "text|||label\na|||bad\n")
    with pytest.raises(ConfigError, match=r"separator = '\|\|\|': needs quoting = \"none\""):
        read(path, GRADES, separator="|||")
    assert numbers(read(path, GRADES, separator="|||", quoting="none")) == [0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train": "x.jsonl", "separator": ";"}, "separator = ';': belongs to csv and tsv files, not to jsonl"),
        ({"train": "x.pq", "dev": "y.json", "columns": ("a", "b")}, "columns = .*, not to jsonl or parquet"),
        ({"train": "x.csv", "format": "text", "quoting": "none"}, "quoting = 'none': .*, not to text"),
    ],
)
def test_keys_of_delimited_files_are_refused_for_others(keys: Mapping[str, Any], message: str) -> None:
    """They were ignored."""
    with pytest.raises(ConfigError, match=message):
        layout_of(Source(**keys))
    assert layout_of(Source(train="x.csv", dev="x.jsonl", separator=";")).separator == ";", "one of the files is"


def test_columns_of_a_file_without_a_header_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", 'good,Title,"Body, text"\nbad,T,B,further\nfair,T\n')
    table = read(path, GRADES, columns=("label", "title", "text"))
    assert table.sentences == (["Body, text", "B"],)
    assert problems(table) == ["x.csv:3: 2 fields, expected at least 3"]


# ---- JSON lines, Parquet, text ------------------------------------------------------------------------------------------


def test_json_lines_have_keys_in_any_order_and_nested_ones(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"meta": {"grade": "good", "a.b": 1}, "body": "one\ntwo"},
        {"body": "\ud83d\ude00", "meta": {"grade": 0}, "more": None},
    ]
    path = write(tmp_path, "x.jsonl", "\ufeff" + "\r\n\r\n".join(map(json.dumps, rows)))
    table = read(path, GRADES, text="body", label="meta.grade")
    assert table.sentences == (["one\ntwo", "😀"],)
    assert numbers(table) == [2, 0]
    assert table.lines.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "a"}', "no key 'label', found 'text'"),
        ('{"label": "bad"}', "no key 'text', found 'label'"),
        ('{"text": 5, "label": "bad"}', "text is 5, expected text"),
        ('{"text": null, "label": "bad"}', "text is None, expected text"),
        ('{"text": "a", "label": null}', "label is missing"),
        ('{"text": "a", "label": ["bad"]}', "label \"['bad']\" is not one of the 3 classes (bad, fair, good)"),
        ('{"text": "\\ud83d", "label": "bad"}', "text has half a surrogate pair: '\\ud83d'"),
        ('{"text": "a", "label": "bad"', "not JSON: Expecting ',' delimiter at character 29"),
        ('["a", "bad"]', 'expected a JSON object, found \'["a", "bad"]\''),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_json_line_is_reported(tmp_path: Path, row: str, reason: str) -> None:
    good = '{"text": "a", "label": "bad"}\n'
    table = read(write(tmp_path, "x.jsonl", good + row + "\n" + good), GRADES)
    assert len(table) == 2
    assert problems(table)[0].startswith(f"x.jsonl:2: {reason}")
    if reason.startswith("not JSON"):  # nor do the columns depend on it
        table = read(write(tmp_path, "x.jsonl", row + "\n" + good), GRADES)
        assert table.lines.tolist() == [2]
        assert problems(table)[0].startswith(f"x.jsonl:1: {reason}")


def test_a_json_array_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "x.json", '[{"text": "a"},\n{"text": "b"}]\n')
    assert refused(path) == "x.json:1: a JSON array, expected JSON lines: one object a line"


def test_a_json_object_over_several_lines_is_refused(tmp_path: Path) -> None:
    """The message was that there are no columns, and named none."""
    path = write(tmp_path, "x.json", json.dumps({"text": "a", "label": "bad"}, indent=2))
    assert refused(path, GRADES).startswith("x.json:1: not JSON: ")
    assert refused(path, GRADES).endswith("expected JSON lines: one object a line")


def test_parquet_rows_are_those_of_pyarrow(tmp_path: Path) -> None:
    texts = [f"row {i} é" for i in range(10_000)]
    columns = {"body": texts, "grade": pa.array([i % 3 for i in range(10_000)], pa.int8()), "id": range(10_000)}
    nested = pa.array([{"topic": "good" if i % 2 else "bad"} for i in range(10_000)])
    pq.write_table(pa.table({**columns, "meta": nested}), tmp_path / "x.parquet", row_group_size=3000)
    table = read(tmp_path / "x.parquet", GRADES, text="body", label="grade", id="id")
    assert table.sentences == (texts,)
    assert numbers(table) == [i % 3 for i in range(10_000)]
    assert table.ids[-1] == "9999"
    assert table.lines.tolist() == list(range(1, 10_001))
    assert numbers(read(tmp_path / "x.parquet", GRADES, text="body", label="meta.topic"))[:3] == [0, 2, 0]
    with TableReader(find(tmp_path / "x.parquet", text="body"), None) as reader:
        assert [len(chunk) for chunk in reader.chunks(4000)] == [4000, 4000, 2000]
        assert reader.position == reader.size == (tmp_path / "x.parquet").stat().st_size


def test_parquet_mistakes_are_one_line(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"], "stars": [1, 2, 3]}), tmp_path / "x.parquet")
    assert problems(read(tmp_path / "x.parquet")) == ["x.parquet:2: text is None, expected text"]
    message = "x.parquet: no column 'label'; expected columns text, label, found 'text, stars'"
    assert refused(tmp_path / "x.parquet", GRADES) == message
    whole = (tmp_path / "x.parquet").read_bytes()
    assert refused(write(tmp_path, "cut.parquet", whole[:-9])).startswith("cut.parquet: not a Parquet file: ")
    assert refused(tmp_path / "none.parquet").startswith("none.parquet: cannot be opened")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(tmp_path / "x.parquet").endswith("a Parquet file needs pyarrow: pip install 'minbert-fast[data]'")


def test_text_files_have_a_sentence_a_line(tmp_path: Path) -> None:
    table = read(write(tmp_path, "x.txt", b'\xef\xbb\xbfone\r\n\n two, "2"\nna\xefve\nlast'))
    assert table.sentences == (["one", ' two, "2"', "last"],)
    assert table.lines.tolist() == [1, 3, 5]
    assert problems(table) == ["x.txt:4: byte 0xef at offset 2 is not UTF-8"]
    assert "no column 'label'" in refused(tmp_path / "x.txt", GRADES)


def test_the_format_is_named_where_the_ending_does_not_say(tmp_path: Path) -> None:
    path = write(tmp_path, "x.data", '{"text": "a"}\n')
    assert refused(path).startswith("x.data: ends in none of .csv, .tsv")
    assert read(path, format="jsonl").sentences == (["a"],)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"text\na\n"), "a gzip file, expected plain text; decompress it"),
        (
            b"PK\x03\x04...",
            "a zip archive or a spreadsheet, expected plain text; unpack it, or save the spreadsheet as CSV",
        ),
        (b"PAR1\x15\x04\x15", 'a Parquet file, expected plain text; name it .parquet, or set format = "parquet"'),
    ],
)
def test_a_file_that_is_no_text_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    """The format of x.csv.gz was asked for, and its bytes were then no UTF-8."""
    for name, keys in (
        ("x.csv.gz", {}),
        ("x.csv.gz", {"format": "csv"}),
        ("x.csv", {}),
        ("x.jsonl", {}),
        ("x.txt", {}),
    ):
        assert refused(write(tmp_path, name, content), **keys) == f"{name}: {message}"
    columns = write(tmp_path, "y.csv", "PAR1,BZh\n3,4\n")  # letters alone are column names
    assert read(columns, text="PAR1").sentences == (["3"],)


def test_several_label_columns_are_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", "text,bug,ui\na,0,1\n")
    rule = ClassSets(("bug", "ui"))
    assert "several label columns are a list in a recipe: label = ['bug', 'ui']" in refused(path, rule, label="bug,ui")
    assert numbers(read(path, rule, label=("bug", "ui"))) == [[0, 1]]
    assert "a list in a recipe" not in refused(path, rule, label="none")


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ('text,label\n"a, b",bad\n', {}),
        ("text\tlabel\na, b\tbad\n", {}),
        ('{"text": "a, b", "label": "bad"}\n', {}),
        ("a, b\n", {"format": "text"}),
        ("bad ||| a, b\n", {"layout": "label-text"}),
    ],
)
def test_standard_input_has_a_header_or_is_json_lines(
    monkeypatch: pytest.MonkeyPatch, content: str, keys: Mapping[str, Any]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    table = read(Path("-"), **keys)
    assert table.sentences == (["a, b"],)
    assert not sys.stdin.buffer.closed


def test_files_are_read_by_a_process_without_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as of `python ... <&-`
    assert read(write(tmp_path, "x.csv", "text\na\n")).sentences == (["a"],)
    for keys in ({"format": "text"}, {}):
        with pytest.raises(DataError, match="standard input: closed, expected data"):
            read(Path("-"), **keys)


def test_errors_in_standard_input_have_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"text,x\na\nb,1\n"))))
    assert problems(read(Path("-"))) == ["standard input:2: 1 fields, expected 2"]


def test_real_data_are_the_same_in_every_format(shared_data: Path, tmp_path: Path) -> None:
    """Quora's questions as other libraries save them, under other names."""
    course = read_rows(find(shared_data / "quora-dev.csv", 2, layout="paraphrase"), FORMATS["paraphrase"].rule)
    first, second = course.sentences
    frame = pandas.DataFrame({"nr": course.ids, "q": first, "r": second, "same": course.labels})
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_csv(tmp_path / "x.tsv", sep="\t", quoting=csv.QUOTE_ALL)
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "x.parquet")
    for path in sorted(tmp_path.iterdir()):
        table = read(path, Classes(("0", "1")), 2, bad=0.0001, text=("q", "r"), label="same", id="nr")
        assert table.sentences == course.sentences, path.name
        assert table.ids == course.ids
        assert numbers(table) == numbers(course)


# ---- Ids and labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["", "sentiment"])
def test_an_id_with_a_line_break_is_a_bad_row(tmp_path: Path, layout: str) -> None:
    """Found when the file is read, not when predictions are written after the last step."""
    path = write(tmp_path, "x.tsv", 'id\tsentence\tsentiment\n"1\n2"\ta\t3\n 7 \tb\t3\n')
    table = read(path, layout=layout, id="id")
    assert problems(table) == ["x.tsv:2: id is '1\\n2', expected an id without line breaks"]
    assert table.ids == ["7"]


def test_labels_are_replaced_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", "text,label\na,pos\nb,-\nc,neg\nd,?\ne,maybe\nf,pos\n")
    keys: dict[str, Any] = {"values": {"pos": 1.0, "neg": 0.0}, "skip": ("-", "?")}
    table = read(path, Numbers(0, 1), **keys)
    assert numbers(table) == [1, 0, 1]
    assert (table.skipped, len(table.bad_rows), table.rows_read) == (2, 1, 6)
    assert problems(table) == ["x.csv:6: label 'maybe' is not a number from 0 to 1"]
    all_skipped = write(tmp_path, "y.csv", "text,label\na,-\n")
    assert refused(all_skipped, GRADES, skip="-") == "y.csv: no row is left: 1 have a label that is skipped"


def test_labels_to_replace_or_skip_and_classes_may_be_written_as_in_the_file(tmp_path: Path) -> None:
    """`1.0` stood for no label, since labels are compared as `1`."""
    path = write(tmp_path, "x.csv", "text,label\na,0.0\nb,1.0\nc,2.0\n")
    assert numbers(read(path, GRADES, values={"0.0": "good", "1.0": "bad"}, skip="2.0")) == [2, 0]
    assert numbers(read(path, Classes(("2.0", "1.0", "0.0")))) == [2, 1, 0]
    other = read(path, Classes(("2", "3", "4")))  # names, so a label is not the number of a class
    assert numbers(other) == [0]
    assert len(other.bad_rows) == 2


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "<NA>", "NaT"])
def test_the_text_of_a_missing_label_is_no_class(missing: str, tmp_path: Path) -> None:
    """Pandas writes such texts. They became classes, and a column of numbers with one of them names."""
    path = write(tmp_path, "x.csv", f"text,label\na,good\nb,{missing}\nc,N/A\nd,None\n")
    found = summarise_labels(find(path)).names()
    assert found == ("N/A", "None", "good")
    (bad,) = read(path, Classes(found)).bad_rows
    assert (bad.line, bad.reason) == (3, f"label {missing!r} is not one of the 3 classes (N/A, None, good)")
    assert read(path, Classes(found), skip=missing or "-").skipped == bool(missing)
    assert not problems(read(path, Classes(("good", "N/A", "None", missing))))  # a task may name it
    numbers = summarise_labels(find(write(tmp_path, "y.csv", f"text,label\na,1.5\nb,{missing}\nc,3\n")))
    assert (numbers.low, numbers.high, numbers.rows) == (1.5, 3, 2)


def test_a_label_that_is_no_number_is_missing(tmp_path: Path) -> None:
    """Libraries other than pandas store a missing number as NaN, which became a class."""
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]}), tmp_path / "x.parquet")
    assert summarise_labels(find(tmp_path / "x.parquet")).counts == {"1": 1, "0": 1}
    assert problems(read(tmp_path / "x.parquet", Classes(("0", "1")))) == ["x.parquet:2: label is missing"]
    infinite = read(write(tmp_path, "x.csv", "text,label\na,1e999\nb,2\n"), Numbers())
    assert problems(infinite) == ["x.csv:2: label '1e999' is not a number"]


def test_several_classes_stand_in_a_list_in_text_or_in_columns(tmp_path: Path) -> None:
    rule = ClassSets(("sport", "war", "art"))
    expected = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    rows = [["art", "sport"], [], ["war"]]
    lines = "".join(json.dumps({"text": "x", "label": row}) + "\n" for row in rows)
    assert numbers(read(write(tmp_path, "x.jsonl", lines), rule)) == expected
    joined = "text;label\n" + "".join(f"x;{', '.join(row)}\n" for row in rows)
    assert numbers(read(write(tmp_path, "x.csv", joined), rule)) == expected
    columns = "text,sport,war,art\nx,1,0,true\nx,0,0,0\nx,0,1.0,False\nx,2,0,0\n"
    table = read(write(tmp_path, "y.csv", columns), rule, label=rule.names)
    assert numbers(table) == expected
    assert problems(table) == ["y.csv:5: sport is '2', expected 0 or 1"]
    assert table.labels is not None
    assert table.labels.dtype == np.float32


@pytest.mark.parametrize(
    "labels", [[[1, 0, 1], [0, 1, 0]], [[1.0, 1.0], [0.0, 0.0]], [[True, False, False]], ["0,1,1"]]
)
def test_rows_of_0_and_1_are_no_names_of_classes(tmp_path: Path, labels: Sequence[Any]) -> None:
    """They became the two classes 0 and 1, which almost every row had."""
    path = write(tmp_path, "x.jsonl", "".join(json.dumps({"text": "x", "label": row}) + "\n" for row in labels))
    expected = (
        f"x.jsonl:1: label is {labels[0]!r}, expected the names of its classes; 0 and 1 need a column for each class"
    )
    assert expected in refused(path, ClassSets(("sport", "war", "art")))
    if isinstance(labels[0], list):
        with pytest.raises(DataError, match="expected the names of its classes"):
            summarise_labels(find(path))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["3", "1.0", "1", ""], LabelSummary(3, {"3": 1, "1": 2}, low=1, high=3, whole=True, empty=1)),
        (["0.5", "2"], LabelSummary(2, {"0.5": 1, "2": 1}, low=0.5, high=2)),
        (["b", "a", "b", "-"], LabelSummary(3, {"b": 2, "a": 1})),
        ([["x", "y"], [], ["x", "x"], [""]], LabelSummary(4, listed={"x": 2, "y": 1}, lists=True)),
        (["x,y", ["y"], ""], LabelSummary(2, {"x,y": 1}, {"y": 1}, lists=True, empty=1)),
        ([True, False], LabelSummary(2, {"true": 1, "false": 1}, low=0, high=1, whole=True)),
    ],
)
def test_labels_are_summarised(tmp_path: Path, values: Sequence[Any], expected: LabelSummary) -> None:
    lines = [json.dumps({"text": "x", "label": value}) for value in values] + ['{"text": 1, "label": "bad row"}']
    assert summarise_labels(find(write(tmp_path, "x.jsonl", "\n".join(lines)), skip="-")) == expected


def test_classes_in_two_orders_are_in_neither() -> None:
    """As of two data sets of the hub: the numbers of one are not those of the other."""
    parts = [LabelSummary(1, {name: 1}, classes=order) for name, order in (("b", ("b", "a")), ("a", ("a", "b")))]
    assert merge_summaries(parts).names() == ("a", "b")
    assert merge_summaries(parts).classes == ()


def test_labels_are_numbers_or_counted_if_they_are_in_every_file() -> None:
    parts = [LabelSummary(1, {"2": 1}, low=2, high=2, whole=True), LabelSummary(1, {"good": 1})]
    assert merge_summaries(parts) == LabelSummary(2, {"2": 1, "good": 1})
    assert merge_summaries([*parts, LabelSummary(20_000)]) == LabelSummary(20_002)  # a file with too many to count


def test_a_summary_of_columns_knows_all_classes_and_one_of_many_values_stays_small(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", "text,a,b,c\nx,1,0,0\ny,1,0,1\n")
    assert summarise_labels(find(path, label=("a", "b", "c"))).listed == {"a": 2, "b": 0, "c": 1}
    many = "text,label\n" + "".join(f"x,{i}.5\n" for i in range(11_000))
    summary = summarise_labels(find(write(tmp_path, "y.csv", many)))
    assert (summary.rows, summary.counts, summary.low, summary.high) == (11_000, {}, 0.5, 10_999.5)


# ---- Layouts of published data sets -------------------------------------------------------------------------------------

NLI = ("entailment", "neutral", "contradiction")
PUBLISHED: dict[str, tuple[str, str, tuple[list[str], ...], list[float]]] = {
    "stsb": (
        "sts-train.csv",
        'main-captions\tMSRvid\t2012test\t0001\t5.000\tA plane takes off.\tAn "air plane" takes off.\n'
        "main-news\tMSRpar\t2012train\t0002\t3.250\tOne\tTwo\thttp://a\thttp://b\n",
        (["A plane takes off.", "One"], ['An "air plane" takes off.', "Two"]),
        [5.0, 3.25],
    ),
    "glue-sst2": ("train.tsv", 'sentence\tlabel\n"quoted\t1\nbad \t0\n', (['"quoted', "bad "],), [1, 0]),
    "glue-cola": ("train.tsv", "gj04\t1\t\tFine.\nclc95\t0\t*\tNot the good.\n", (["Fine.", "Not the good."],), [1, 0]),
    "glue-mrpc": (
        "train.tsv",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tHe "said .\tShe\r\n0\t9\t5\tA\tB\r\n',
        (['He "said .', "A"], ["She", "B"]),
        [1, 0],
    ),
    "glue-stsb": (
        "train.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\t2012\t1\tnone\tnone\tA\tB\t2.5\n",
        (["A"], ["B"]),
        [2.5],
    ),
    "glue-qqp": (
        "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\tWhy?\tWhat?\t1\n",
        (["Why?"], ["What?"]),
        [1],
    ),
    "glue-mnli": (
        "train.tsv",
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tA\tB\tneutral\tneutral\n1\tC\tD\t-\t-\n",
        (["A"], ["B"]),
        [1],
    ),
    "glue-qnli": ("dev.tsv", "index\tquestion\tsentence\tlabel\n0\tQ?\tS\tnot_entailment\n", (["Q?"], ["S"]), [1]),
    "glue-rte": ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tentailment\n", (["A"], ["B"]), [0]),
    "glue-wnli": ("dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\tA\tB\t1\n", (["A"], ["B"]), [1]),
    "quora": (
        "quora_duplicate_questions.tsv",
        'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"0"\t"1"\t"2"\t"Two\nlines, ""a""\there?"\t"B?"\t"0"\n',
        (['Two\nlines, "a"\there?'], ["B?"]),
        [0],
    ),
    "nli": (
        "snli_1.0_dev.jsonl",
        '{"gold_label": "contradiction", "sentence1": "A", "sentence2": "B", "pairID": "1"}\n'
        '{"gold_label": "-", "sentence1": "C", "sentence2": "D", "pairID": "2"}\n',
        (["A"], ["B"]),
        [2],
    ),
    "label-text": (
        "rt.train",
        '1 ||| a | gripping film\n0 ||| dull, "long"\n',
        (["a | gripping film", 'dull, "long"'],),
        [1, 0],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_layouts_are_read_as_they_are_published(tmp_path: Path, name: str) -> None:
    file, content, texts, labels = PUBLISHED[name]
    layout = FORMATS[name]
    rule = layout.rule or Classes(layout.classes or ("0", "1"))
    table = read(write(tmp_path, file, content), rule, len(texts), layout=name)
    assert table.sentences == texts
    assert numbers(table) == labels
    assert table.bad_rows == ()
    assert table.skipped == (1 if layout.skip else 0)
    if layout.classes:
        summary = summarise_labels(find(tmp_path / file, len(texts), layout=name))
        assert summary.names() == layout.classes
        assert merge_summaries([summary, LabelSummary(1, {layout.classes[0]: 1})]).names() == layout.classes
    if layout.id:
        assert table.ids[0] in ("0", "7")


def test_every_named_layout_is_tried() -> None:
    course = {"sentiment", "paraphrase", "similarity", "polarity", "triplets", "lines"}
    named_as = {"snli": "nli", "multinli": "nli"}  # the same files, found in a data directory
    for name in FORMATS.keys() - course - {"acceptability"}:
        assert named_as.get(name, name) in PUBLISHED, name
    for name, same in named_as.items():
        assert replace(FORMATS[name], name="", stem="") == replace(FORMATS[same], name="", stem="")


def test_cola_s_test_file_has_a_header(tmp_path: Path) -> None:
    path = write(tmp_path, "test.tsv", "index\tsentence\n0\tBill whistled.\n")
    assert read(path, layout="glue-cola").sentences == (["Bill whistled."],)


def test_a_layout_can_be_changed_in_part(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", '{"premise": "A", "hypothesis": "B", "gold": "n"}\n')
    keys: dict[str, Any] = {"text": ("premise", "hypothesis"), "label": "gold", "values": {"n": "neutral"}}
    table = read(path, Classes(NLI), 2, layout="nli", **keys)
    assert numbers(table) == [1]
    other = write(tmp_path, "x.tsv", "n\tsentence1\tsentence2\tsame\nr\ta\tb\t7\ns\ta\tb\t1\n")
    found = find(other, 2, layout="paraphrase", label="same", id="n")
    assert problems(read_rows(found, found.layout.rule, max_bad_rows=1.0)) == [
        "x.tsv:2: same is '7', expected a whole number from 0 to 1"
    ]


def test_sources_name_layouts_files_or_tables_of_keys() -> None:
    assert sources_of("quora") == (Source(layout="quora"),)
    assert sources_of("quora.csv") == (Source(train="quora.csv"),)
    both = sources_of([{"train": ["a.jsonl", "b.jsonl"], "layout": "nli"}, "similarity"])
    assert both == (Source(train=("a.jsonl", "b.jsonl"), layout="nli"), Source(layout="similarity"))
    with pytest.raises(ConfigError, match=r"data\[1\]: unknown key 'txt'; did you mean 'text'"):
        sources_of(["a.csv", {"train": "b.csv", "txt": "body"}])


def test_a_source_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"layout = 'quora': 2 texts, expected 1"):
        find_input(Source(train="x.tsv", layout="quora"), "train", 1)
    with pytest.raises(ConfigError, match=r"text = \['a', 'b'\]: 2 texts, expected 1"):
        find_input(Source(train="x.tsv", text=("a", "b")), "train", 1)
    with pytest.raises(DataError, match="no layout is called 'quorra'"):
        find_input(Source(train="x.tsv", layout="quorra"), "train", 1)
    assert find_input(Source(train="x.csv"), "dev", 1) is None
    assert find_input(Source(layout="quora"), "train", 2) is None


def test_several_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "text,label\na,bad\nb,poor\n")
    write(tmp_path, "b.jsonl", '\n{"text": "c", "label": "good"}\n')
    found = find_input(Source(train=(str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl"))), "train", 1)
    assert found is not None
    table = read_rows(found, GRADES, max_bad_rows=1.0)
    assert table.sentences == (["a", "c"],)
    assert numbers(table) == [0, 2]
    assert problems(table) == ["a.csv:3: label 'poor' is not one of the 3 classes (bad, fair, good)"]
    assert table.lines.tolist() == [2, 2]
    with TableReader(found, GRADES, max_bad_rows=1.0) as reader:
        assert len(list(reader.chunks())) == 2
        assert reader.position == reader.size


def test_a_second_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "text,label\na,bad\n")
    found = find_input(Source(train=(str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))), "train", 1)
    assert found is not None
    with pytest.raises(DataError, match=r"b\.csv: cannot be opened: No such file"):
        summarise_labels(found)


def test_the_usual_column_is_read_only_if_there_is_one_of_it(tmp_path: Path) -> None:
    """The first of several was read."""
    with pytest.raises(DataError, match=r"x\.csv:1: more than one column 'text', found 'text, text'"):
        list(read_sentences(write(tmp_path, "x.csv", "text,text\na,b\n")))
