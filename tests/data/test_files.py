# SPDX-License-Identifier: Apache-2.0
"""Reading data files: every row is used or reported; every other error is one line that names its place."""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minbert_fast.data import read_table
from minbert_fast.data.files import TableReader
from minbert_fast.data.formats import FORMATS, add_format, find_tables
from minbert_fast.data.inputs import file_input
from minbert_fast.data.messages import BadRow, DataError
from minbert_fast.data.readers.course import MAX_RECORD_LINES, OpenQuoteError, split_quoted
from minbert_fast.data.readers.lines import MAX_LINE_BYTES
from tests.small import ODD_TEXTS

SENTIMENT_HEADER = "\tid\tsentence\tsentiment\n"
PAIR_HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"


def write(folder: Path, content: str | bytes, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path | str, task: str = "sentiment", **options: object) -> str:
    """The message of the error when reading `path`, which must be one line."""
    with pytest.raises(DataError) as caught:
        read_table(path, task, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def reports(path: Path, task: str = "sentiment") -> list[str]:
    """The bad rows of a file that tolerates them, without the path."""
    table = read_table(path, task, max_bad_rows=1.0)
    return [str(bad).removeprefix(f"{path}:") for bad in table.bad_rows]


# ------------------------------------------------------------------------------------------- rows that are used


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    """SST's test file has an extra column; columns may have any order."""
    path = write(tmp_path, "sentiment\textra\t sentence \t\tid \n3\tx\tA good film .\t0\tabc\n")
    table = read_table(path, "sentiment")
    assert table.sentences == (["A good film ."],)
    assert table.ids == ["abc"]
    assert table.labels is not None
    assert table.labels.tolist() == [3]
    assert table.labels.dtype == np.int64


def test_pairs_have_float_labels(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR_HEADER + "0\ta\tone\ttwo\t1.0\n1\tb\tthree\t\t0\n")
    table = read_table(path, "paraphrase")
    assert table.sentences == (["one", "three"], ["two", ""])
    assert table.labels is not None
    assert table.labels.dtype == np.float32
    assert table.labels.tolist() == [1.0, 0.0]


def test_triplets_are_comma_separated_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path, 'sent0,sent1,hard_neg\n"a, b",c,"d ""e"""\n')
    table = read_table(path, "triplets")
    assert table.sentences == (["a, b"], ["c"], ['d "e"'])
    assert table.labels is None
    assert table.ids == ["2"]


def test_unlabeled_reading_needs_no_label_column(tmp_path: Path) -> None:
    path = write(tmp_path, "\tid\tsentence\n0\ta\tGood .\n")
    assert read_table(path, "sentiment", labeled=False).labels is None
    assert "no column 'sentiment'" in refused(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark(tmp_path: Path, end: str, bom: bytes) -> None:
    text = (SENTIMENT_HEADER + "0\ta\tGood .\t3\n\n1\tb\tBad .\t1").replace("\n", end)
    table = read_table(write(tmp_path, bom + text.encode()), "sentiment")
    assert table.sentences == (["Good .", "Bad ."],)
    assert table.lines.tolist() == [2, 4]
    assert table.bad_rows == ()


def test_text_of_every_kind_is_preserved(tmp_path: Path) -> None:
    rows = "".join(f"{index}\tid{index}\t{text}\t2\n" for index, text in enumerate(ODD_TEXTS))
    table = read_table(write(tmp_path, SENTIMENT_HEADER + rows), "sentiment")
    assert table.sentences[0] == list(ODD_TEXTS)
    assert table.bad_rows == ()


def test_quotes_are_doubled_inside_quoted_fields_only(tmp_path: Path) -> None:
    rows = '0\ta\t"say ""hi"" now"\tno 5" disk\t1\n1\tb\t"tab\there"\t""\t0\n'
    table = read_table(write(tmp_path, PAIR_HEADER + rows), "paraphrase")
    assert table.sentences == (['say "hi" now', "tab\there"], ['no 5" disk', ""])


def test_quoted_field_over_line_breaks(tmp_path: Path) -> None:
    rows = '0\ta\t"one\ntwo ""x""\n\nthree"\tother\t1\n1\tb\tc\td\t0\n'
    table = read_table(write(tmp_path, PAIR_HEADER + rows), "paraphrase")
    assert table.sentences[0] == ['one\ntwo "x"\n\nthree', "c"]
    assert table.lines.tolist() == [2, 6]
    assert table.bad_rows == ()


def test_chunks_add_up_to_the_table(tmp_path: Path) -> None:
    rows = "".join(f"{i}\tid{i}\tsentence {i}\t{i % 7}\n" for i in range(50))
    path = write(tmp_path, SENTIMENT_HEADER + rows)
    whole = read_table(path, "sentiment", max_bad_rows=0.5)
    with TableReader(file_input(path, "sentiment"), FORMATS["sentiment"].rule, max_bad_rows=0.5) as reader:
        parts = list(reader.chunks(rows=8))
        assert reader.position == reader.size == path.stat().st_size
    assert all(part.rows_read <= 8 for part in parts)
    assert [text for part in parts for text in part.sentences[0]] == whole.sentences[0]
    assert [bad for part in parts for bad in part.bad_rows] == list(whole.bad_rows)
    assert whole.rows_read == 50


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet='a" \t,é😀', max_size=8), min_size=1, max_size=4), st.sampled_from("\t,"))
def test_splitting_inverts_the_csv_writer(fields: list[str], separator: str) -> None:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="").writerow(fields)
    assert split_quoted(out.getvalue(), separator) == fields


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='ab"\t', max_size=12))
def test_splitting_agrees_with_the_strict_csv_reader(text: str) -> None:
    try:
        expected = next(csv.reader([text], delimiter="\t", strict=True), [""])
    except csv.Error as error:
        kind = OpenQuoteError if "unexpected end" in str(error) else ValueError
        with pytest.raises(kind):
            split_quoted(text, "\t")
    else:
        assert split_quoted(text, "\t") == (expected or [""])


# -------------------------------------------------------------------------------------- rows that are reported


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"0\ta\ttext\t5", "sentiment is '5', expected a whole number from 0 to 4"),
        (b"0\ta\ttext\t-1", "sentiment is '-1', expected a whole number from 0 to 4"),
        (b"0\ta\ttext\t2.5", "sentiment is '2.5', expected a whole number from 0 to 4"),
        (b"0\ta\ttext\tnan", "sentiment is 'nan', expected a whole number from 0 to 4"),
        (b"0\ta\ttext\tinf", "sentiment is 'inf', expected a whole number from 0 to 4"),
        (b"0\ta\ttext\t1_0", "sentiment is '1_0', expected a whole number from 0 to 4"),
        (b"0\ta\ttext\t", "sentiment is '', expected a whole number from 0 to 4"),
        ("0\ta\ttext\t٣".encode(), r"sentiment is '\u0663', expected a whole number from 0 to 4"),
        (b"0\ta\ttext", "3 fields, expected 4"),
        (b"0\ta\ttext\t3\t4", "5 fields, expected 4"),
        (b"0\ta\tcaf\xe9\t3", "byte 0xe9 at offset 7 is not UTF-8"),
        (b"0\ta\tte\0xt\t3", "NUL character at offset 6"),
        (b'0\ta\t"text\t3', "a quote is opened and never closed: '\"text\\t3'"),
        (b'0\ta\t"te"xt\t3', "text after a closing quote (quotes in a quoted field are doubled): '\"te\"xt\\t3'"),
        (b"0\ta\t" + b"x" * MAX_LINE_BYTES + b"\t3", "a line of 1,048,583 bytes, expected at most 1,048,576"),
    ],
)
def test_bad_row_is_reported_and_no_other_row_is_lost(tmp_path: Path, row: bytes, reason: str) -> None:
    content = SENTIMENT_HEADER.encode() + b"0\ta\tgood\t3\n" + row + b'\n2\tc\t"quoted"\t1\n'
    path = write(tmp_path, content)
    assert reports(path) == [f"3: {reason}"]
    table = read_table(path, "sentiment", max_bad_rows=1.0)
    assert table.sentences == (["good", "quoted"],)
    assert table.lines.tolist() == [2, 4]


def test_similarity_accepts_fractions_within_its_range(tmp_path: Path) -> None:
    rows = "0\ta\tx\ty\t4.999\n1\tb\tx\ty\t5.0\n2\tc\tx\ty\t5.001\n3\td\tx\ty\t1e1\n"
    path = write(tmp_path, "\tid\tsentence1\tsentence2\tsimilarity\n" + rows)
    assert reports(path, "similarity") == [
        "4: similarity is '5.001', expected a number from 0 to 5",
        "5: similarity is '1e1', expected a number from 0 to 5",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        '0\ta\t"open\tx\t1\n1\tb\ty\tz\t0\n2\tc\tv\tw\t1\n',  # never closed
        '0\ta\t"open\tx\t1\n1\tb\t"y"\tz\t0\n2\tc\tv\tw\t1\n',  # the next row's quote would close it
        '0\ta\tx\t"1\n1\tb\ty" q\tz\t0\n2\tc\tv\tw\t1\n',
        '0\ta\t"open\tx\t1\n1\tb\ty"\tz\t0\n2\tc\tv\tw\t1\n',  # a closing quote further down
    ],
)
def test_unbalanced_quote_spoils_no_other_row(tmp_path: Path, rows: str) -> None:
    table = read_table(write(tmp_path, PAIR_HEADER + rows), "paraphrase", max_bad_rows=1.0)
    assert [bad.line for bad in table.bad_rows] == [2]
    assert table.lines.tolist() == [3, 4]


def test_quoted_field_has_a_limit_of_lines(tmp_path: Path) -> None:
    field = "\n".join(["x"] * (MAX_RECORD_LINES + 2))
    table = read_table(
        write(tmp_path, f'{PAIR_HEADER}0\ta\t"{field}"\tq\t1\n1\tb\ty\tz\t0\n'), "paraphrase", max_bad_rows=1.0
    )
    assert table.sentences == (["y"], ["z"])
    assert table.rows_read == MAX_RECORD_LINES + 3


def test_bad_rows_are_tolerated_below_the_limit_only(tmp_path: Path) -> None:
    good = "".join(f"{i}\ta\ttext\t2\n" for i in range(99))
    path = write(tmp_path, SENTIMENT_HEADER + good + "99\ta\ttext\t9\n")
    assert read_table(path, "sentiment", max_bad_rows=0.011).rows_read == 100
    message = refused(path, max_bad_rows=0.01)
    assert message.startswith(f"{path}: 1 of 100 rows are bad (1.0%; fewer than 1.0% are tolerated), the first at")
    assert message.endswith(f"{path}:101: sentiment is '9', expected a whole number from 0 to 4")
    clean = write(tmp_path, SENTIMENT_HEADER + good)
    assert len(read_table(clean, "sentiment", max_bad_rows=0.0)) == 99


# --------------------------------------------------------------------------------------- files that are refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": empty file"),
        (b"\n\n", ": empty file"),
        (b"\xef\xbb\xbf", ": empty file"),
        (SENTIMENT_HEADER.encode(), ": no rows after the header"),
        (b"\0" * 100, ":1: NUL character at offset 0"),
        (SENTIMENT_HEADER.encode("utf-16"), ":1: UTF-16 text, expected UTF-8"),
        (b"\tid\tsent\xe9\n", ":1: byte 0xe9 at offset 8 is not UTF-8"),
        (b"x" * (MAX_LINE_BYTES + 1), ":1: a line of 1,048,577 bytes, expected at most 1,048,576"),
        (
            b'"id\tsentence\tsentiment\n0\ta\t1\n',
            ":1: a quote is opened and never closed: '\"id\\tsentence\\tsentiment'",
        ),
        (
            b"id,sentence,sentiment\na,b,1\n",
            ":1: no column 'id'; expected tab-separated columns id, sentence, sentiment, found 'id,sentence,sentiment'",
        ),
        (
            b"id\tsentence\tsentence\tsentiment\n",
            ":1: more than one column 'sentence'; expected tab-separated columns id, sentence, sentiment, "
            "found 'id\\tsentence\\tsentence\\tsentiment'",
        ),
    ],
)
def test_unusable_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    assert refused(path) == f"{path}{message}"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert refused(fifo) == f"{fifo}: a FIFO, expected a regular file"
    assert refused(tmp_path) == f"{tmp_path}: a directory, expected a regular file"
    assert refused("/dev/null") == "/dev/null: a special file, expected a regular file"
    assert refused(tmp_path / "no") == f"{tmp_path / 'no'}: cannot be opened: No such file or directory"
    assert refused("a\0b") == r"'a\x00b': cannot be opened: embedded null byte"
    assert refused(tmp_path / "two\nlines").count("\n") == 0


def test_unknown_layout_is_refused(tmp_path: Path) -> None:
    assert "no layout is called 'poetry'" in refused(tmp_path / "x", "poetry")


def test_a_layout_of_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="the files of 'lines' have another layout already"):
        add_format(replace(FORMATS["lines"], texts=("line",)))


# ------------------------------------------------------------------------------------- data directories


def test_find_tables_drops_missing_tasks_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, "x", "sts-dev.csv")
    write(tmp_path, "x", "ids-sst-dev.csv")
    found = find_tables(tmp_path, "dev")
    assert found.paths == {"sentiment": tmp_path / "ids-sst-dev.csv", "similarity": tmp_path / "sts-dev.csv"}
    assert found.notices == (f"no quora-dev.csv in {tmp_path}: task paraphrase is left out",)


def test_find_tables_knows_the_course_s_test_files(tmp_path: Path) -> None:
    write(tmp_path, "x", "quora-test-student.csv")
    assert find_tables(tmp_path, "test").paths == {"paraphrase": tmp_path / "quora-test-student.csv"}


def test_layouts_without_file_names_are_said(tmp_path: Path) -> None:
    write(tmp_path, "x", "sts-dev.csv")
    found = find_tables(tmp_path, "dev", ("quora", "similarity", "nli"))
    assert list(found.paths) == ["similarity"]
    expected = "layout quora, nli: has no file names of its own; name the files (train = ..., layout = ...)"
    assert found.notices == (expected,)
    with pytest.raises(DataError, match="layout quora: has no file names of its own"):
        find_tables(tmp_path, "dev", ("quora",))


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_find_tables_refuses_a_directory_without_data(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("x")
    with pytest.raises(DataError, match=f"^{re.escape(str(folder))}: [^\n]*$"):
        find_tables(folder)


@pytest.mark.parametrize(
    ("name", "task", "rows"),
    [
        ("ids-sst-train.csv", "sentiment", 8544),
        ("ids-sst-dev.csv", "sentiment", 1101),
        ("quora-train.csv", "paraphrase", 15_061),
        ("quora-dev.csv", "paraphrase", 2752),
        ("sts-train.csv", "similarity", 6040),
        ("sts-dev.csv", "similarity", 863),
        ("ids-cfimdb-train.csv", "polarity", 1707),
        ("ids-cfimdb-dev.csv", "polarity", 245),
        ("nli-triplets-train.csv", "triplets", 20_000),
    ],
)
def test_real_files_are_read_completely(shared_data: Path, name: str, task: str, rows: int) -> None:
    table = read_table(shared_data / name, task, max_bad_rows=0.0)
    assert len(table) == rows
    layout = FORMATS[task]
    with open(shared_data / name, newline="", encoding="utf-8") as file:
        expected = list(csv.DictReader(file, delimiter=layout.separator))
    for column, texts in zip(layout.texts, table.sentences, strict=True):
        assert texts == [row[column] for row in expected]


def test_bad_row_prints_as_file_line_reason() -> None:
    assert str(BadRow(Path("x.csv"), 7, "why")) == "x.csv:7: why"
