# SPDX-License-Identifier: Apache-2.0
"""File writers, copies of predictors, and the settings in sentence-transformers directories."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import multiprocessing
import os
import pickle
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from minbert_fast import BertModel, Predictor
from minbert_fast.common import storage
from minbert_fast.common.schema import ConfigError, build
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.model import sentence_modules
from minbert_fast.model.sentence_modules import SentenceModules
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.flat import FlatParameters, ParameterSpec, StageParameters
from minbert_fast.tasks import MultitaskModel, build_tasks
from minbert_fast.tasks.exporting import write_encoder
from minbert_fast.tasks.inference import predictions
from tests.small import read_predictions

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
SENTENCES = ["A film", "the girl eats an apple in the park", "", "a very Good film"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "best"
    recipe = build(Recipe, {"tasks": {"sentiment": {}, "similarity": {}}}, "test")
    model = MultitaskModel(BertModel.from_pretrained(sample_directory().model), build_tasks(recipe))
    model.save(folder, recipe.to_toml(), Tokenizer.from_pretrained(sample_directory().model))
    return folder


# ---- Files --------------------------------------------------------------------------------------------------------------


def read_from(fifo: Path) -> tuple[threading.Thread, list[bytes]]:
    """Reads a FIFO to its end in another thread."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(fifo.read_bytes()), daemon=True)
    thread.start()
    return thread, found


def writers(path: Path) -> None:
    """Each way in which the package writes a file."""
    storage.write_text(path, "text\n")
    storage.write_bytes(path, b"bytes\n")
    storage.write_json(path, {"json": 1})
    predictions.write_predictions(path, "Predicted", ["a"], np.array([1]))
    with storage.whole_file(path) as file:
        file.write(b"by bits\n")


@pytest.mark.timeout(60)
def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """The rename replaced a pipe or a device by a regular file."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for write, expected in (
        (lambda: storage.write_text(fifo, "text\n"), b"text\n"),
        (lambda: storage.write_json(fifo, [1]), b"[\n  1\n]\n"),
        (lambda: predictions.write_predictions(fifo, "P", ["a"], np.array([1])), b"id \t P \na , 1 \n"),
        (lambda: storage.write_tensors(fifo, {"a": torch.zeros(2)}) and None, None),
    ):
        thread, found = read_from(fifo)
        write()
        thread.join()
        assert stat.S_ISFIFO(fifo.stat().st_mode)
        assert expected is None or found == [expected]
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    """`predict --output /dev/stdout`, run as root, replaced the device by a file of predictions."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError as error:
        pytest.skip(f"no device can be made here ({error})")
    writers(device)
    assert stat.S_ISCHR(device.stat().st_mode)
    assert list(tmp_path.iterdir()) == [device]


@pytest.mark.parametrize("target", ["real/out.txt", "../outside/out.txt"])
@pytest.mark.parametrize("exists", [False, True])
def test_symbolic_links_are_followed(tmp_path: Path, target: str, exists: bool) -> None:
    """A link was replaced by a file, and its target kept the old content."""
    folder = tmp_path / "folder"
    folder.mkdir()
    real = (folder / target).resolve()
    real.parent.mkdir()
    if exists:
        real.write_text("old")
    link = folder / "link"
    link.symlink_to(target)
    writers(link)
    assert link.is_symlink()
    assert real.read_text() == "by bits\n"
    assert list(real.parent.iterdir()) == [real]


def test_a_linked_directory_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk" / "best").mkdir(parents=True)
    (tmp_path / "best").symlink_to("disk/best")
    storage.write_directory(tmp_path / "best", lambda folder: storage.write_text(folder / "a", "new"))
    assert (tmp_path / "best").is_symlink()
    assert (tmp_path / "disk" / "best" / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "best", "best", "disk"]


@contextlib.contextmanager
def standard_output_into(descriptor: int) -> Iterator[None]:
    """As `> FILE` does for a new process: descriptor 1 is a copy of this one, and sys.stdout buffers text for it."""
    before = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        with open(1, "w", closefd=False) as stream, contextlib.redirect_stdout(stream):
            yield
    finally:
        os.dup2(before, 1)
        os.close(before)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("-", "pipe"), ("stdout", "pipe"), ("-", "append"), ("/proc/self/fd/1", "append"), ("out.txt", "append")],
)
def test_standard_output_by_any_name(tmp_path: Path, name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirected standard output is a regular file: its rename lost what the shell's file held."""
    out = tmp_path / "out.txt"
    out.write_text("old\n")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout, which a failing test must not replace
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    with open(reader) as read, open(writer, "w") as pipe, out.open("a") as file:
        with standard_output_into((pipe if mode == "pipe" else file).fileno()):
            print("before")
            storage.write_text(Path(name), "written\n")
            print("after")
        pipe.close()
        found = read.read() if mode == "pipe" else out.read_text().removeprefix("old\n")
    assert found == "before\nwritten\nafter\n"
    assert out.read_text().startswith("old\n")


def test_predictions_alone_stand_on_standard_output(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minbert_fast.predict", "--checkpoint", str(checkpoint), "--task", "sentiment"]
    source = str(sample_directory().data / "ids-sst-dev.csv")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    done = subprocess.run(
        [*command, "--input", source, "--output", str(tmp_path / "stdout"), "--device", "cpu", "--precision", "fp32"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    (tmp_path / "out.csv").write_text(done.stdout)
    assert len(read_predictions(tmp_path / "out.csv")[0]) > 100
    assert re.search(r"[\d,]+ predictions\n$", done.stderr)


@pytest.mark.timeout(60)
def test_a_format_with_a_header_at_its_end_refuses_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    thread, _ = read_from(tmp_path / "fifo.npy")
    with storage.whole_file(tmp_path / "fifo.npy") as file, pytest.raises(OSError, match="a pipe cannot hold"):
        storage.ArrayFile(file, 3)
    thread.join()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write_bytes` left its temporary file behind."""
    path = tmp_path / "out"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: storage.write_text(path, "new"), lambda: storage.write_tensors(path, {"a": torch.ones(1)})):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(IsADirectoryError):
        storage.write_text(tmp_path, "new")


# These files grow while they are open: the run's log, and the arrays of an unfinished cache entry.
GROWING = {"trainer/outputs.py", "data/cache_entries.py"}
WRITES = re.compile(
    r"os\.(replace|rename|fsync)\(|\.(write_text|write_bytes)\(|open\([^)]*[\"'][wax]\+?b?\+?[\"']|mkstemp|NamedTemp"
)


def test_the_package_writes_files_in_one_room() -> None:
    package = ROOT / "minbert_fast"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if WRITES.search(path.read_text(encoding="utf-8").replace("storage.write", ""))
    }
    assert found - GROWING == {"common/storage.py"}


# ---- Copies -------------------------------------------------------------------------------------------------------------


def answers(model: Predictor) -> tuple[np.ndarray, np.ndarray]:
    return model.encode(SENTENCES), model.predict("sentiment", SENTENCES).values


def assert_same(model: Predictor, expected: tuple[np.ndarray, np.ndarray]) -> None:
    for found, wanted in zip(answers(model), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_a_copied_predictor_predicts_as_the_first(checkpoint: Path, how: str, precision: str) -> None:
    """Its weights were looked up by the identities of another model's parameters: KeyError, or the wrong ones."""
    first = Predictor.from_pretrained(checkpoint, device="cpu", precision=precision)
    expected = answers(first)
    copied: Predictor
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(first))
    else:
        copied = copy.copy(first) if how == "copy" else copy.deepcopy(first)
    assert_same(copied, expected)
    shared = {id(p) for p in copied.encoder.parameters()} & {id(p) for p in first.encoder.parameters()}
    assert bool(shared) == (how == "copy")
    assert copied.heads is not None
    assert copied.heads.encoder is copied.encoder
    if how == "deepcopy":
        with torch.no_grad():
            first.encoder.word_embedding.weight.zero_()
    del first
    gc.collect()
    assert_same(copied, expected)


def _spawned(model: Predictor, queue: object) -> None:
    queue.put(answers(model))  # type: ignore[attr-defined]


@pytest.mark.timeout(120)
def test_a_spawned_predictor_predicts_as_the_first(checkpoint: Path) -> None:
    model = Predictor.from_pretrained(checkpoint, device="cpu", precision="fp32")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_spawned, args=(model, queue))
    process.start()
    found = queue.get(timeout=100)
    process.join()
    for one, wanted in zip(found, answers(model), strict=True):
        np.testing.assert_array_equal(one, wanted)


def test_flat_parameters_refuse_to_be_copied() -> None:
    """A copy's parameters are no views of its buffer, and its table holds the identities of others."""
    model = torch.nn.Linear(3, 3)
    flat = FlatParameters(StageParameters([ParameterSpec("weight", model.weight)], None, {}, []), torch.float32)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="flat parameters cannot be copied"):
            copied(flat)


# ---- Directories of sentence-transformers -------------------------------------------------------------------------------


@pytest.fixture
def sentence_model(tmp_path: Path) -> Path:
    """The sample model as a sentence-transformers directory, its tokenizer one that keeps case."""
    folder = tmp_path / "sentences"
    folder.mkdir()
    for path in sample_directory().model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    sentence_modules.write(folder, SentenceModules(folder, "mean", normalize=True), 64)
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def load(folder: Path) -> Predictor:
    return Predictor.from_pretrained(folder, device="cpu", precision="fp32")


@pytest.mark.parametrize("normalize", [None, False, True])
def test_truncate_dim_is_honoured(sentence_model: Path, tmp_path: Path, normalize: bool | None) -> None:
    """Vectors had all their numbers."""
    library = pytest.importorskip("sentence_transformers")
    whole = load(sentence_model)
    change(sentence_model / "config_sentence_transformers.json", truncate_dim=10)
    cut = load(sentence_model)
    found = cut.encode(SENTENCES, normalize=normalize)
    assert found.shape == (4, 10)
    assert cut.encode([]).shape == (0, 10)
    if normalize is False:
        np.testing.assert_array_equal(found, whole.encode(SENTENCES, normalize=False)[:, :10])
    else:
        published = library.SentenceTransformer(str(sentence_model), device="cpu")
        expected = published.encode(SENTENCES, normalize_embeddings=bool(normalize))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    hit = cut.search(SENTENCES[1], cut.index(SENTENCES), top=1)[0]
    assert (hit.row, hit.score) == (1, pytest.approx(1.0, abs=1e-5))
    (tmp_path / "exported").mkdir()
    write_encoder(tmp_path / "exported", cut, modules=True)
    np.testing.assert_array_equal(load(tmp_path / "exported").encode(SENTENCES, normalize=normalize), found)


def test_do_lower_case_of_either_file_is_honoured(sentence_model: Path) -> None:
    """`do_lower_case` of sentence_bert_config.json was ignored: capitals became unknown words."""
    library = pytest.importorskip("sentence_transformers")
    texts = ["A Very GOOD film", "Café a film"]
    lowered = load(sentence_model).encode(texts)
    (sentence_model / "tokenizer.json").unlink()
    for own, sentence in ((True, False), (False, False), (False, True)):
        change(sentence_model / "tokenizer_config.json", do_lower_case=own)
        change(sentence_model / "sentence_bert_config.json", do_lower_case=sentence)
        found = load(sentence_model).encode(texts)
        expected = library.SentenceTransformer(str(sentence_model), device="cpu").encode(texts)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert np.allclose(found[0], lowered[0], rtol=1e-4, atol=1e-5) == (own or sentence)


@pytest.mark.parametrize(
    ("file", "key", "value", "expected"),
    [
        ("config_sentence_transformers.json", "truncate_dim", 0, "a whole number from 1"),
        ("config_sentence_transformers.json", "truncate_dim", "ten", "a whole number from 1"),
        ("config_sentence_transformers.json", "truncate_dim", True, "a whole number from 1"),
        ("sentence_bert_config.json", "do_lower_case", "yes", "true or false"),
        ("sentence_bert_config.json", "max_seq_length", 1, "a whole number from 2"),
    ],
)
def test_values_of_another_kind_are_one_line(
    sentence_model: Path, file: str, key: str, value: object, expected: str
) -> None:
    change(sentence_model / file, **{key: value})
    with pytest.raises(ConfigError, match=rf"{file}: {key} = {value!r}: expected {expected}$") as caught:
        load(sentence_model)
    assert "\n" not in str(caught.value)
