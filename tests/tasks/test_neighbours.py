# SPDX-License-Identifier: Apache-2.0
"""Sentiment by comparison with labelled training sentences: features, choice of sentences, whole runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.data import Tokenizer, read_table
from minbert_fast.data.cache import tokenize_table
from minbert_fast.model.bert import BertModel
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel
from minbert_fast.tasks.inference.predictor import Predictor
from minbert_fast.tasks.neighbours import LabelledSentences
from tests.small import TRAIN_ROWS, read_predictions, small_data, small_run

STAGES = ("--recipe", "bertology-sst-to-sts", "--lr", "1e-3", "--set", "tasks.sentiment.neighbours=3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def test_features_are_cosines_and_labels() -> None:
    torch.manual_seed(0)
    stored = LabelledSentences(width=7, classes=3, per_class=2)
    vectors, labels, x = torch.randn(6, 7), torch.tensor([0, 0, 1, 1, 2, 2]), torch.randn(4, 7)
    stored.store(vectors, labels)
    expected = torch.empty(4, 12)
    for i in range(4):
        for j in range(6):
            expected[i, j] = (x[i] * vectors[j]).sum() / (x[i].square().sum().sqrt() * vectors[j].square().sum().sqrt())
            expected[i, 6 + j] = labels[j]
    torch.testing.assert_close(stored(x), expected)


def test_each_class_has_equally_many_sentences() -> None:
    stored = LabelledSentences(width=2, classes=3, per_class=4)
    labels = np.array([0] * 50 + [1] * 2 + [2] * 9)
    rows = stored.choose(labels, seed=5)
    assert labels[rows].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(rows[labels[rows] == 0])) == 4
    assert set(rows[labels[rows] == 1]) == {50, 51}, "a rare class's sentences recur"
    np.testing.assert_array_equal(rows, stored.choose(labels, seed=5))
    assert (rows != stored.choose(labels, seed=6)).any()
    with pytest.raises(ValueError, match="class 1"):
        stored.choose(np.array([0, 2]), seed=5)


@pytest.mark.parametrize("training", [False, True])
def test_nearest_sentences_vote_weighted_by_cosine(training: bool) -> None:
    """In training the nearest sentence is the sentence itself, and is ignored."""
    torch.manual_seed(0)
    stored = LabelledSentences(width=7, classes=3, per_class=4, nearest=3, temperature=0.2).train(training)
    vectors, labels = torch.rand(9, 7), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    stored.store(torch.randn(12, 7), torch.zeros(12))
    stored.store(vectors, labels)
    x = vectors[[1, 5, 8]] * 2.5 if training else torch.cat([torch.randn(2, 7), -torch.rand(1, 7)])
    for row, votes in zip(x, stored(x), strict=True):
        cosines = [float(row @ v / (row.norm() * v.norm())) for v in vectors]
        order = sorted(range(9), key=lambda i: -cosines[i])
        near = order[1:4] if training else order[:3]
        powers = [math.exp(cosines[i] / 0.2) for i in near]
        for label in range(3):
            expected = sum(p for p, i in zip(powers, near, strict=True) if labels[i] == label) / sum(powers)
            assert votes[label].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_with_votes_no_sentence_is_repeated() -> None:
    stored = LabelledSentences(width=2, classes=3, per_class=20, nearest=2)
    labels = np.array([0] * 50 + [1] * 2 + [2] * 9)
    rows = stored.choose(labels, seed=5)
    assert np.bincount(labels[rows]).tolist() == [20, 2, 9]
    assert len(set(rows)) == len(rows)


@pytest.mark.usefixtures("one_thread")
def test_votes_over_all_of_sst_train_save_and_predict(data: Path, tmp_path: Path) -> None:
    flags = small_run(data, tmp_path / "run", "--recipe", "wish-nearest", "--lr", "1e-3", "--max-steps", "20")
    assert cli.run(train.main, flags) == 0
    model = MultitaskModel.load(tmp_path / "run" / "best")
    stored = model.head("sentiment").labelled_sentences()
    assert stored is not None
    assert int((stored.labels >= 0).sum()) == TRAIN_ROWS
    predictor = Predictor.from_pretrained(tmp_path / "run" / "best")
    (sentences,) = read_table(data / "ids-sst-dev.csv", "sentiment").sentences
    written = read_predictions(tmp_path / "run" / "predictions" / "sst-dev-output.csv")[1]
    assert np.array_equal(predictor.sentiment(sentences), written)


@pytest.mark.usefixtures("one_thread")
def test_stored_vectors_come_from_the_runs_own_encoder(data: Path, tmp_path: Path) -> None:
    """They are the same after an interruption in the stage that uses them."""
    for name, cuts in (("whole", ()), ("cut", ("6",))):
        for steps in (*cuts, "10"):
            more = ("--resume",) if steps == "10" and cuts else ()
            flags = small_run(data, tmp_path / name, *STAGES, "--max-steps", "10", "--stop-after", steps, *more)
            assert cli.run(train.main, flags) == 0
    last = [tmp_path / name / "last" for name in ("whole", "cut")]
    for file in ("model.safetensors", "heads.safetensors"):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes()

    found = load_file(last[0] / "heads.safetensors")
    model = MultitaskModel.load(last[0])
    stored = model.head("sentiment").labelled_sentences()
    assert stored is not None
    table = tokenize_table(read_table(data / "ids-sst-train.csv", "sentiment"), Tokenizer.from_pretrained(last[0]))
    rows = stored.choose(table.labels, Recipe.load(str(last[0] / "recipe.toml")).training.seed)
    encoder = BertModel.from_pretrained(last[0]).eval()
    for row, vector in zip(rows, found["sentiment.neighbours.vectors"], strict=True):
        ids = torch.from_numpy(np.asarray(table.columns[0][row], dtype=np.int64))[None]
        with torch.no_grad():
            expected = encoder(ids, torch.ones_like(ids))["pooler_output"][0]
        torch.testing.assert_close(vector, expected / expected.norm(), rtol=1e-4, atol=1e-5)
    assert found["sentiment.neighbours.labels"].tolist() == [label for label in range(5) for _ in range(3)]


def test_the_encoder_must_be_frozen(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = small_run(data, tmp_path, "--recipe", "course", "--set", "tasks.sentiment.neighbours=3")
    assert cli.run(train.main, flags) == 2
    assert "model.freeze = true" in capsys.readouterr().err
