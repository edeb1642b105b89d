# SPDX-License-Identifier: Apache-2.0
"""The encode benchmark on the tiny model: all candidates run, are checked and compared; wrong vectors are detected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import encode, harness
from minbert_fast import BertModel
from minbert_fast.data import Tokenizer, sample_directory

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_candidate_passes_its_check_and_ours_is_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("MINBERT_FAST_DATA", str(tmp_path / "absent"))
    monkeypatch.setattr(encode, "COUNT", {"cpu": {"tiny": 40}})
    monkeypatch.setattr(encode, "BATCH_SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr(encode, "model_directory", lambda shape, folder: (sample_directory().model, "the sample's"))
    rows = {row.name: row for row in encode.run(torch.device("cpu"), harness.Ceilings(1e9, 1e9, 1e9))}
    assert {"ours fp32", "ours bf16", "our tokenizer alone"} <= rows.keys()
    theirs = [name for name in rows if name.startswith("sentence-transformers")]
    assert len(theirs) == 2
    for row in rows.values():
        assert not row.note, row
        assert row.median is not None
    assert set(rows["ours bf16"].speedup) == set(theirs)


def test_flash_attention_without_padding_is_a_baseline_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for installed in (False, True):
        monkeypatch.setattr(
            encode.importlib.util, "find_spec", lambda name, found=installed: object() if found else None
        )
        assert list(encode.ways(cpu)) == ["fp32", "bf16"]
        assert ("bf16 unpadded" in encode.ways(cuda)) == installed
    assert encode.ways(cuda)["bf16 unpadded"]["attn_implementation"] == "flash_attention_2"


def test_a_wrong_vector_is_detected() -> None:
    expected = np.random.default_rng(0).normal(size=(4, 8))
    encode.check_cosines(2 * expected, expected)
    expected[2, 3] += 1
    with pytest.raises(AssertionError, match="cosine"):
        encode.check_cosines(np.roll(expected, 1, axis=0), expected)


def test_made_up_sentences_have_real_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINBERT_FAST_DATA", str(tmp_path / "absent"))
    tokenizer = Tokenizer.from_pretrained(sample_directory().model)
    texts, what = encode.sentences(300, tokenizer)
    lengths = tokenizer.encode(texts).lengths
    assert "made-up" in what
    assert 12 < lengths.mean() < 24


def test_models_of_random_weights_have_the_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MINBERT_FAST_MINILM", raising=False)
    monkeypatch.setitem(encode.CONFIGS, "MiniLM-L6", replace(encode.CONFIGS["MiniLM-L6"], hidden_size=24))
    directory, what = encode.model_directory("MiniLM-L6", tmp_path)
    assert what == "random weights"
    assert Tokenizer.from_pretrained(directory).vocab_size == 30522
    config = BertModel.from_pretrained(directory).config
    assert (config.num_hidden_layers, config.hidden_size) == (6, 24)
