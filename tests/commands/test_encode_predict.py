# SPDX-License-Identifier: Apache-2.0
"""`python -m minbert_fast.encode` and `predict` from their command lines: files in and out, one-line errors."""

from __future__ import annotations

import csv
import errno
import importlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from minbert_fast import BertModel, Predictor, encode, evaluate, predict
from minbert_fast.common import cli
from minbert_fast.common.schema import build
from minbert_fast.common.storage import ArrayFile, whole_file
from minbert_fast.data import Tokenizer, read_table, sample_directory, sentence_files
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel, build_tasks
from minbert_fast.tasks.inference import predictions
from tests.small import error_line, read_predictions

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = str(sample_directory().model)
DATA = sample_directory().data
SENTENCES = ["a film", "", "the girl eats an apple in the park", 'a, very "good" film', "näive"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "best"
    recipe = build(Recipe, {"tasks": {"sentiment": {}, "paraphrase": {}, "similarity": {}}}, "test")
    model = MultitaskModel(BertModel.from_pretrained(MODEL), build_tasks(recipe))
    model.save(folder, recipe.to_toml(), Tokenizer.from_pretrained(MODEL))
    return folder


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return Predictor.from_pretrained(MODEL, device="cpu", precision="fp32").encode(SENTENCES)


def run_encode(source: Path | str, output: Path, *more: str) -> int:
    flags = ["--model", MODEL, "--input", str(source), "--output", str(output)]
    return cli.run(encode.main, [*flags, "--precision", "fp32", "--device", "cpu", *more])


def run_predict(checkpoint: Path, task: str, source: Path, output: Path, *more: str) -> int:
    flags = ["--checkpoint", str(checkpoint), "--task", task, "--input", str(source), "--output", str(output)]
    return cli.run(predict.main, [*flags, "--precision", "fp32", "--device", "cpu", *more])


# ---- encode -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_text_lines_to_npy(
    tmp_path: Path, vectors: np.ndarray, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(b"\xef\xbb\xbf" + "".join(s + ending for s in SENTENCES).encode())
    assert run_encode(source, tmp_path / "new" / "out.npy") == 0
    got = np.load(tmp_path / "new" / "out.npy")
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, vectors, rtol=1e-4, atol=1e-5)
    assert "5 vectors of 64" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.npy"]


def test_chunks_stream_in_order(tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_files, "CHUNK", 2)
    (tmp_path / "in.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    assert run_encode(tmp_path / "in.txt", tmp_path / "out.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), vectors, rtol=1e-4, atol=1e-5)


def test_a_table_to_safetensors(tmp_path: Path, vectors: np.ndarray) -> None:
    rows = ["id,text,other", *(f'{i},"{s.replace(chr(34), chr(34) * 2)}",x' for i, s in enumerate(SENTENCES))]
    (tmp_path / "in.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert run_encode(tmp_path / "in.csv", tmp_path / "out.safetensors", "--column", "text", "--normalize") == 0
    got = load_file(tmp_path / "out.safetensors")["embeddings"]
    np.testing.assert_allclose(got, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_a_course_file_and_cls_pooling(tmp_path: Path) -> None:
    source = DATA / "ids-sst-dev.csv"
    assert run_encode(source, tmp_path / "out.npy", "--pooling", "cls") == 0
    model = Predictor.from_pretrained(MODEL, device="cpu", precision="fp32")
    expected = model.encode(read_table(source, "sentiment").sentences[0], pooling="cls")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-4, atol=1e-5)


def test_standard_input_and_an_empty_file(tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(SENTENCES).encode())))
    assert run_encode("-", tmp_path / "out.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), vectors, rtol=1e-4, atol=1e-5)
    (tmp_path / "empty.txt").touch()
    assert run_encode(tmp_path / "empty.txt", tmp_path / "empty.npy") == 0
    assert np.load(tmp_path / "empty.npy").shape == (0, 64)


@pytest.mark.parametrize(
    ("name", "content", "more", "problem"),
    [
        ("in.txt", b"fine\nna\xefve\n", (), "in.txt:2: byte 0xef at offset 2 is not UTF-8"),
        ("in.txt", b"a\n", ("--column", "text"), "a column needs a file that ends in one of .csv, .tsv"),
        ("in.csv", b",id,body\n0,1,a\n", (), "which column? --column names one of 'id, body'"),
        ("in.csv", b"id,text\n1,a\n", ("--column", "txt"), "no column 'txt'"),
        ("in.csv", b"id,sentence\n1,a\n1,a,b\n", (), "in.csv:3: 3 fields, expected 2"),
        ("in.txt", b'{"text": "a"}\n', (), "in.txt:1: JSON lines, expected a sentence"),
        ("in.jsonl", b'{"body": "a", "n": 1}\n', (), "in.jsonl:1: which column? --column names one of 'body, n'"),
        ("in.jsonl", b'{"text": "a"}\n{"text": 1}\n', (), "in.jsonl:2: text is 1, expected text"),
        ("in.txt", b"a\n", ("--pooling", "median"), "invalid choice: 'median'"),
    ],
)
def test_mistakes_in_the_input_are_one_line(
    tmp_path: Path, name: str, content: bytes, more: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run_encode(tmp_path / name, tmp_path / "out.npy", *more) == 2
    assert problem in error_line(capsys)
    assert not (tmp_path / "out.npy").exists()


def test_mistakes_in_names_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_encode(tmp_path / "none.txt", tmp_path / "out.npy") == 2
    assert "cannot be opened: No such file" in capsys.readouterr().err
    assert run_encode(DATA / "ids-sst-dev.csv", tmp_path / "out.csv") == 2
    assert "ends in .npy or .safetensors" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run_encode(DATA / "ids-sst-dev.csv", tmp_path / "file" / "out.npy") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_broken_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    np.save(path, np.ones(3))

    def stopped() -> None:
        with whole_file(path) as file, ArrayFile(file, 2) as rows:
            rows.write(np.zeros((1, 2)))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert np.load(path).tolist() == [1, 1, 1]
    assert list(tmp_path.iterdir()) == [path]


# ---- predict ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "file"), [("sentiment", "ids-sst-dev.csv"), ("paraphrase", "quora-dev.csv"), ("similarity", "sts-dev.csv")]
)
def test_predictions_in_both_formats(checkpoint: Path, tmp_path: Path, task: str, file: str) -> None:
    assert run_predict(checkpoint, task, DATA / file, tmp_path / "out.csv") == 0
    classes = () if task == "similarity" else ("--probabilities",)
    assert run_predict(checkpoint, task, DATA / file, tmp_path / "out.jsonl", *classes) == 0
    model = Predictor.from_pretrained(checkpoint, device="cpu", precision="fp32")
    table = read_table(DATA / file, task)
    expected = model.predict(task, *table.sentences)
    ids, values = read_predictions(tmp_path / "out.csv")
    assert ids == table.ids
    np.testing.assert_array_equal(values, expected.values.astype(np.float64))
    predictions.write_predictions(tmp_path / "whole.csv", model.tasks[task].header, table.ids, expected.values)
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()
    objects = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [one["id"] for one in objects] == ids
    assert [one["prediction"] for one in objects] == expected.values.tolist()
    if expected.probabilities is None:
        assert "probabilities" not in objects[0]
    else:
        names = model.tasks[task].class_names
        assert names is not None
        for one, shares in zip(objects, expected.probabilities, strict=True):
            assert list(one["probabilities"]) == list(names)
            assert list(one["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-6)
            assert max(one["probabilities"], key=one["probabilities"].get) == names[int(one["prediction"])]


def test_texts_that_are_cut_are_counted(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were cut without a word; training counts them."""
    long = "film " * 400
    (tmp_path / "in.txt").write_text(f"{long}\na film\n{long}\n", encoding="utf-8")
    assert run_encode(tmp_path / "in.txt", tmp_path / "out.npy") == 0
    assert capsys.readouterr().out.endswith("3 vectors of 64, 2 sentences cut to 128 tokens\n")
    (tmp_path / "sst.csv").write_text(f"id\tsentence\tsentiment\na\t{long}\t1\nb\ta film\t2\n", encoding="utf-8")
    assert run_predict(checkpoint, "sentiment", tmp_path / "sst.csv", tmp_path / "out.csv") == 0
    assert capsys.readouterr().out.endswith("2 predictions, 1 rows cut to 128 tokens\n")
    (tmp_path / "quora.csv").write_text(
        f"id\tsentence1\tsentence2\tis_duplicate\na\ta film\t{long}\t1.0\n", encoding="utf-8"
    )
    assert run_predict(checkpoint, "paraphrase", tmp_path / "quora.csv", tmp_path / "out.csv") == 0
    assert capsys.readouterr().out.endswith("1 predictions, 1 rows cut to 128 tokens\n")
    flags = ["--checkpoint", str(checkpoint), "--sentiment", str(tmp_path / "sst.csv"), "--device", "cpu"]
    assert cli.run(evaluate.main, flags) == 0
    assert "sst.csv: 1 rows are cut to 128 tokens (data.max_length)" in capsys.readouterr().err


def test_labels_are_optional_and_bad_rows_are_reported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["id\tsentence", *(f"r{i}\ta film of {i}" for i in range(150)), "short", "last\tthe end"]
    (tmp_path / "test.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert run_predict(checkpoint, "sentiment", tmp_path / "test.csv", tmp_path / "out.csv") == 0
    captured = capsys.readouterr()
    assert "151 predictions, 1 rows left out" in captured.out
    assert "test.csv:152: 1 fields, expected 2" in captured.err
    assert read_predictions(tmp_path / "out.csv")[0][-1] == "last"


def test_prediction_mistakes_are_one_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.csv").write_text("id\tsentence\nshort\n", encoding="utf-8")
    cases = [
        (
            checkpoint,
            "polarity",
            DATA / "ids-sst-dev.csv",
            "no polarity head (it has sentiment, paraphrase, similarity)",
        ),
        (checkpoint, "similarity", DATA / "ids-sst-dev.csv", "no column 'sentence1'"),
        (checkpoint, "sentiment", tmp_path / "bad.csv", "1 of 1 rows are bad"),
        (checkpoint, "sentiment", tmp_path / "none.csv", "cannot be opened"),
        (Path(MODEL), "sentiment", DATA / "ids-sst-dev.csv", "no heads"),
        (tmp_path / "nowhere", "sentiment", DATA / "ids-sst-dev.csv", "no such file or directory"),
    ]
    for folder, task, source, problem in cases:
        assert run_predict(folder, task, source, tmp_path / "out.csv") == 2
        error = capsys.readouterr().err
        assert problem in error
        assert error.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "out.csv").exists()


# ---- predict: a task of one's own, any format in and out -------------------------------------------------------------

REVIEWS = [("Rude, cold", "bad"), ('A "fine"\nlunch', "fair"), ("Wonderful cake", "great")]


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one task, whose training file had the columns `review` and `key`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "best"
    data = {"train": "gone.csv", "text": "review", "label": "stars", "id": "key"}
    task = {"kind": "classification", "classes": ["bad", "fair", "great"], "data": data}
    recipe = build(Recipe, {"tasks": {"stars": task}}, "test")
    model = MultitaskModel(BertModel.from_pretrained(MODEL), build_tasks(recipe))
    model.save(folder, recipe.to_toml(), Tokenizer.from_pretrained(MODEL))
    return folder


def predict_topics(topics: Path, *more: object) -> int:
    flags = ["--checkpoint", topics, "--precision", "fp32", "--device", "cpu", *more]
    return cli.run(predict.main, [str(word) for word in flags])


def test_every_format_gives_the_same_predictions(topics: Path, tmp_path: Path) -> None:
    """Read as the training file was: by its columns, whatever the format."""
    rows = [{"key": f"k{i}", "review": text, "more": i} for i, (text, _) in enumerate(REVIEWS)]
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["more", "review", "key"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [tmp_path / "in.csv", tmp_path / "in.jsonl"]
    if importlib.util.find_spec("pyarrow"):
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
        sources.append(tmp_path / "in.parquet")
    model = Predictor.from_pretrained(topics, device="cpu", precision="fp32")
    found = model.predict("stars", [text for text, _ in REVIEWS])
    assert found.probabilities is not None
    for source in sources:
        out = source.with_suffix(source.suffix + ".out.csv")
        assert predict_topics(topics, "--input", source, "--output", out, "--probabilities") == 0
        with out.open(newline="", encoding="utf-8") as file:
            written = list(csv.DictReader(file))
        assert [row["id"] for row in written] == ["k0", "k1", "k2"]
        for row, shares in zip(written, found.probabilities, strict=True):
            named = {name: float(row[f"probability_{name}"]) for name in ("bad", "fair", "great")}
            assert list(named.values()) == pytest.approx(shares.tolist(), abs=1e-5)
            assert row["prediction"] == max(named, key=named.__getitem__)
    for ending, is_json in (("jsonl", True), ("ndjson", True), ("json", True), ("txt", False)):
        out = tmp_path / f"out.{ending}"
        assert predict_topics(topics, "--input", tmp_path / "in.csv", "--output", out) == 0
        assert out.read_text().startswith('{"id": "k0"' if is_json else "id,prediction\nk0,")
    plain = tmp_path / "plain.csv"
    assert predict_topics(topics, "--input", tmp_path / "in.csv", "--output", plain) == 0
    assert plain.read_text().splitlines()[0] == "id,prediction"


def test_plain_text_has_no_id_column(topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """predict asked a .txt file for the id column of the training file, and for its text column."""
    (tmp_path / "in.txt").write_text("Rude, cold\n\nWonderful cake\n", encoding="utf-8")
    assert predict_topics(topics, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.csv") == 0
    written = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
    assert [line.partition(",")[0] for line in written] == ["id", "1", "3"]
    capsys.readouterr()
    flags = ("--input", tmp_path / "in.txt", "--id", "key", "--output", tmp_path / "out.csv")
    assert predict_topics(topics, *flags) == 2
    assert "no column 'key'" in capsys.readouterr().err


def test_a_full_disk_names_the_file(topics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A write that fails does not know its file: the message was "No space left on device" alone."""
    (tmp_path / "in.txt").write_text("Rude, cold\n", encoding="utf-8")
    assert predict_topics(topics, "--input", tmp_path / "in.txt", "--output", "/dev/full") == 1
    assert "error: /dev/full: No space left on device\n" in capsys.readouterr().err
    with pytest.raises(OSError, match="No space") as caught, whole_file(tmp_path / "out.csv"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "out.csv")
    with pytest.raises(OSError, match=r"^a pipe cannot hold this$"), whole_file(tmp_path / "out.csv"):
        raise OSError("a pipe cannot hold this")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_standard_input_to_standard_output(
    topics: Path, form: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    text = "".join(json.dumps({"body": review}) + "\n" for review, _ in REVIEWS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    flags = ("--input", "-", "--text", "body", "--output", "-", "--format", form)
    assert predict_topics(topics, *flags) == 0
    out, error = capfdbinary.readouterr()
    lines = out.decode().splitlines()
    assert b"3 predictions" in error
    if form == "csv":
        assert lines[0] == "id,prediction"
        assert {line.split(",")[1] for line in lines[1:]} <= {"bad", "fair", "great"}
    else:
        assert [list(json.loads(line)) for line in lines] == [["id", "prediction"]] * 3


def test_a_course_task_reads_files_of_other_formats(checkpoint: Path, tmp_path: Path) -> None:
    table = read_table(DATA / "sts-dev.csv", "similarity")
    rows = [{"sentence1": a, "sentence2": b} for a, b in zip(*table.sentences, strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in.csv").write_text('left,right\n"a, b",c\n')
    assert run_predict(checkpoint, "similarity", DATA / "sts-dev.csv", tmp_path / "course.jsonl") == 0
    assert run_predict(checkpoint, "similarity", tmp_path / "in.jsonl", tmp_path / "own.jsonl") == 0
    course, own = (
        [json.loads(line)["prediction"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("course.jsonl", "own.jsonl")
    )
    assert course == own
    assert run_predict(checkpoint, "similarity", tmp_path / "in.csv", tmp_path / "o.csv", "--text", "left,right") == 0
    assert (tmp_path / "o.csv").read_text().startswith("id,prediction\n2,")


def test_a_data_folder_that_no_task_would_read_is_refused(topics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores were those of the run's own dev rows."""
    assert cli.run(evaluate.main, ["--checkpoint", str(topics), "--data", str(DATA), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "every task of this model names its own files; expected --task NAME --input FILE" in error


@pytest.mark.parametrize(
    ("model", "more", "problem"),
    [
        ("topics", ["--text", "revue"], "in.csv:1: no column 'revue'"),
        ("topics", ["--text", "review,key"], "expected 1"),
        ("topics", ["--probabilities", "--format", "course"], "--format course: has no place for --probabilities"),
        ("topics", ["--output", "out.tsv"], "--output out.tsv: predictions are CSV or JSON lines"),
        ("topics", ["--output", "out.parquet"], "--output out.parquet: predictions are CSV or JSON lines"),
        ("topics", ["--output", "../{}/in.csv"], "in.csv: is the file of --input"),
        ("checkpoint", [], "--task: expected one of sentiment, paraphrase, similarity"),
        ("checkpoint", ["--task", "similarity", "--probabilities"], "--probabilities: task similarity has no classes"),
    ],
)
def test_flags_of_predict_that_do_not_fit(
    model: str,
    more: list[str],
    problem: str,
    topics: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in.csv").write_text("key,review\n1,fine\n")
    monkeypatch.chdir(tmp_path)
    more = [word.format(tmp_path.name) for word in more]
    folder = topics if model == "topics" else checkpoint
    assert predict_topics(folder, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.csv", *more) == 2
    assert problem in error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]
    assert (tmp_path / "in.csv").read_text() == "key,review\n1,fine\n"
