# SPDX-License-Identifier: Apache-2.0
"""The packed path gives each sentence the vector of the drop-in model, for any batches."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from minbert_fast import BertModel
from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.collate import by_length
from minbert_fast.model.snapshot import Snapshot
from minbert_fast.tasks.inference import sentence_vectors
from minbert_fast.tasks.inference.sentence_vectors import embed, encode, gather, side_by_side
from tests.tolerance import cosine_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> BertModel:
    return BertModel.from_pretrained(sample_directory().model)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(sample_directory().model)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    table = read_table(sample_directory().data / "ids-sst-dev.csv", "sentiment")
    long = " ".join(table.sentences[0])  # far beyond the model's positions
    return ["", *table.sentences[0][:60], long, table.sentences[0][3]]


def vectors_of(
    model: BertModel, texts: list[str], tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, **options: Any
) -> np.ndarray:
    return encode(Snapshot(model, dtype), texts, tokenizer, **options)


def one_by_one(model: BertModel, tokenizer: Tokenizer, sentences: list[str], pooling: str, limit: int) -> np.ndarray:
    """Each sentence alone through `model(input_ids, attention_mask)`."""
    vectors = []
    for tokens in tokenizer.encode(sentences, max_length=limit):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            out = model(ids, torch.ones_like(ids))
        hidden = out["last_hidden_state"][0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "pooler": out["pooler_output"][0]}
        vectors.append(pooled[pooling].numpy())
    return np.stack(vectors)


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
def test_vectors_are_those_of_each_sentence_alone(model, tokenizer, sentences, pooling):
    expected = one_by_one(model, tokenizer, sentences, pooling, 128)
    told: list[int] = []
    got = vectors_of(model, sentences, tokenizer, pooling=pooling, progress=told.append)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
    assert sum(told) == len(sentences)
    assert np.abs(got[1] - got[2]).max() > 0.01  # not one vector for all


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_batches_of_any_size_and_a_shorter_limit(model, tokenizer, sentences, budget):
    expected = one_by_one(model, tokenizer, sentences, "mean", 9)
    snapshot = Snapshot(model, torch.float32)
    got = encode(snapshot, sentences, tokenizer, max_length=9, token_budget=budget, normalize=True)
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=2e-4, atol=2e-5)


def test_more_sentences_than_are_encoded_together(model, tokenizer, sentences, monkeypatch):
    """And a limit above the model's positions, which the long sentence would reach."""
    expected = vectors_of(model, sentences, tokenizer)
    monkeypatch.setattr(sentence_vectors, "CHUNK", 7)
    got = vectors_of(model, sentences, tokenizer, max_length=10_000)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_bf16_products_keep_the_direction(model, tokenizer, sentences):
    exact = vectors_of(model, sentences, tokenizer)
    rounded = vectors_of(model, sentences, tokenizer, dtype=torch.bfloat16)
    assert cosine_rows(exact, rounded).min() > 0.999
    assert np.abs(exact - rounded).max() > 0  # products were rounded


def test_real_weights_agree_with_transformers(minilm: Path):
    transformers = pytest.importorskip("transformers")
    sentences = ["A man is playing a guitar.", "x", "The 3rd question: why?  Because, naïvely, it works!" * 3]
    stock = transformers.AutoModel.from_pretrained(minilm).eval()
    batch = transformers.AutoTokenizer.from_pretrained(minilm)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = stock(**batch).last_hidden_state * batch["attention_mask"][..., None]
    expected = (hidden.sum(1) / batch["attention_mask"].sum(1, keepdim=True)).numpy()
    model, tokenizer = BertModel.from_pretrained(minilm), Tokenizer.from_pretrained(minilm)
    np.testing.assert_allclose(vectors_of(model, sentences, tokenizer), expected, rtol=1e-3, atol=1e-5)
    rounded = vectors_of(model, sentences, tokenizer, dtype=torch.bfloat16)
    assert cosine_rows(rounded, expected).min() > 0.999


class Sendings(TorchFunctionMode):
    """Notes each copy of a tensor from the host to another device: whether it leaves the host free."""

    def __init__(self) -> None:
        super().__init__()
        self.free: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.copy_) and isinstance(args[0], torch.Tensor):
            source, target = (args[1], args[0]) if func is torch.Tensor.copy_ else (args[0], out)
            if source.device.type == "cpu" != target.device.type:
                self.free.append(bool(kwargs.get("non_blocking")))
        return out


def test_no_batch_of_sentences_waits_for_the_one_before(model, tokenizer, sentences):
    """Named after the bug: a copy of each batch's places waited for all that the GPU had queued."""
    snapshot = Snapshot(copy.deepcopy(model).to("meta"), torch.float32)
    with Sendings() as sendings:
        embed(snapshot, tokenizer.encode(sentences), token_budget=200)
    assert len(sendings.free) > 20
    assert all(sendings.free)


def test_a_string_is_no_list_of_sentences(model, tokenizer):
    with pytest.raises(ValueError, match="expected a list"):
        vectors_of(model, "a film", tokenizer)
    with pytest.raises(ValueError, match="max_length is 1"):
        vectors_of(model, ["a film"], tokenizer, max_length=1)
    with pytest.raises(ValueError, match="max_length is 0"):
        vectors_of(model, ["a film"], tokenizer, max_length=0)


def test_training_mode_and_gradients_stay_out_of_it(model, tokenizer, sentences):
    """No dropout and no graph, though the model trains; and the model is left as it was."""
    expected = vectors_of(model, sentences, tokenizer)
    model.train()
    try:
        np.testing.assert_array_equal(vectors_of(model, sentences, tokenizer), expected)
        assert model.training
        assert all(p.grad is None for p in model.parameters())
    finally:
        model.eval()


def test_batches_hold_each_sentence_once_under_the_budget():
    lengths = np.random.default_rng(0).integers(2, 40, 200)
    batches = list(by_length(lengths, 100))
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(lengths[batch].sum() <= 100 for batch in batches)
    assert [len(batch) for batch in by_length(np.array([500, 3, 2]), 10)] == [1, 2]
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_rows_are_cut_with_the_last_token_kept(tokenizer):
    encoded = tokenizer.encode(["a film about a film about a film", "a"])
    rows = gather(encoded, np.array([1, 0]), 5)
    assert rows.cu_seqlens.tolist() == [0, 3, 8]
    assert rows.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert rows.tokens[3:8].tolist() == [*encoded[0][:4].tolist(), tokenizer.sep_id]
    assert rows.max_seqlen == 5


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_a_batch_a_thread_gives_the_vectors_of_one_thread(model, tokenizer, sentences, pooling):
    encoded = tokenizer.encode(sentences, max_length=64)
    snapshot = Snapshot(model, torch.float32)
    expected = embed(snapshot, encoded, pooling=pooling, token_budget=40)
    told: list[int] = []
    torch.set_num_threads(3)  # `one_thread` takes it back
    got = embed(snapshot, encoded, pooling=pooling, token_budget=40, progress=told.append)
    assert torch.get_num_threads() == 3
    assert torch.equal(got, expected)
    assert told == [len(chosen) for chosen in by_length(encoded.lengths, 40)]


def test_side_by_side_keeps_order_and_hands_on_errors():
    cpu = torch.device("cpu")
    torch.set_num_threads(2)
    threads: set[tuple[int, int]] = set()

    def work(item: int) -> int:
        threads.add((threading.get_ident(), torch.get_num_threads()))
        time.sleep(0.002)
        if item == 29:
            raise ValueError("the last one")
        return item

    assert list(side_by_side(work, range(20), cpu)) == list(range(20))
    assert {count for _, count in threads} == {1}
    assert len(threads) == 2
    with pytest.raises(ValueError, match="the last one"):
        list(side_by_side(work, range(30), cpu))
    assert list(side_by_side(work, range(3), cpu)) == [0, 1, 2]
    assert (threading.get_ident(), 2) in threads  # too few to share out
