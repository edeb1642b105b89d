# SPDX-License-Identifier: Apache-2.0
"""The drop-in encoder against transformers and against itself: padded, packed, truncated, cast, in course code."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from minbert_fast import BertConfig, BertModel
from minbert_fast.model.packing import pack

SMALL = BertConfig(
    vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
    max_position_embeddings=40,
)  # fmt: skip


def masks(batch: int, length: int) -> Tensor:
    """Right padding, left padding, a hole, full, one token alone."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    mask[1, : length // 3] = 0
    mask[2, 2:5] = 0
    mask[3, 1:] = 0
    return mask


def stock_twin(model: BertModel, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def small() -> BertModel:
    torch.manual_seed(0)
    return BertModel(SMALL).eval()


@pytest.mark.parametrize("types", [None, torch.arange(6 * 17).view(6, 17) % 2], ids=["one type", "two types"])
def test_equals_transformers_with_padding_anywhere(small: BertModel, tmp_path: Path, types: Tensor | None) -> None:
    ids, mask = torch.randint(1, 97, (6, 17)), masks(6, 17)
    twin = stock_twin(small, tmp_path)
    with torch.no_grad():
        ours, theirs = small(ids, mask, types), twin(ids, attention_mask=mask, token_type_ids=types)
    attended = mask.bool()
    torch.testing.assert_close(
        ours["last_hidden_state"][attended], theirs.last_hidden_state[attended], atol=1e-5, rtol=0
    )
    first = attended[:, 0]
    torch.testing.assert_close(ours["pooler_output"][first], theirs.pooler_output[first], atol=1e-5, rtol=0)
    assert (ours["last_hidden_state"][~attended] == 0).all()


def test_real_weights_equal_transformers(minilm: Path) -> None:
    ours = BertModel.from_pretrained(minilm)
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    ids, mask = torch.randint(999, 30000, (6, 33)), masks(6, 33)
    with torch.no_grad():
        a = ours(ids, mask)["last_hidden_state"][mask.bool()]
        b = theirs(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_static_rectangle_equals_dropping_padding(small: BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = torch.randint(1, 97, (6, 17)), masks(6, 17)
    packed = small(ids, mask)["last_hidden_state"]
    monkeypatch.setattr("minbert_fast.ops.backend.drops_padding", lambda _: False)
    torch.testing.assert_close(small(ids, mask)["last_hidden_state"], packed, atol=1e-5, rtol=0)


def test_packed_equals_padded(small: BertModel) -> None:
    rng = np.random.default_rng(0)
    sentences = [[rng.integers(1, 97, n).tolist() for n in lengths] for lengths in ((3, 1, 17), (9,), (2, 30))]
    batch = pack(sentences, token_capacity=70, sentence_capacity=9)
    flat = [torch.tensor(sentence) for task in sentences for sentence in task]
    ids, mask = (nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (flat, [torch.ones_like(t) for t in flat]))
    with torch.no_grad():
        packed = small(batch)["last_hidden_state"]
        padded = small(ids, mask)["last_hidden_state"]
    torch.testing.assert_close(packed[: batch.num_tokens], padded[mask.bool()], atol=1e-5, rtol=0)
    assert torch.isfinite(packed).all()


def test_gradients_equal_the_naive_encoder(small: BertModel) -> None:
    ids, mask = torch.randint(1, 97, (6, 17)), masks(6, 17)
    cotangent = torch.randn(6, 17, 48) * mask[:, :, None]
    fast = torch.autograd.grad(
        small(ids, mask)["last_hidden_state"], list(small.parameters()), cotangent, allow_unused=True
    )
    naive = torch.autograd.grad(small.stock(ids, mask), list(small.parameters()), cotangent, allow_unused=True)
    for (name, _), a, b in zip(small.named_parameters(), fast, naive, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4, msg=name)


def test_longer_than_the_positions_is_truncated_with_a_count(small: BertModel) -> None:
    ids = torch.randint(1, 97, (3, 50))
    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    with pytest.warns(UserWarning, match="2 of 3 sentences exceed 40 positions"):
        hidden = small(ids, mask)["last_hidden_state"]
    assert hidden.shape == (3, 50, 48)
    assert (hidden[:, 40:] == 0).all()
    assert torch.equal(hidden[:, :40], small(ids[:, :40], mask[:, :40])["last_hidden_state"])


def test_dropout_acts_in_training_alone_and_follows_the_seed(small: BertModel) -> None:
    ids, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9)
    assert torch.equal(small(ids, mask)["pooler_output"], small(ids, mask)["pooler_output"])
    small.train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(small(ids, mask)["pooler_output"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    "place",
    [
        "embed_dropout",
        "bert_layers.0.self_attention.dropout",
        "bert_layers.0.attention_dropout",
        "bert_layers.1.out_dropout",
    ],
)
def test_each_dropout_acts(small: BertModel, place: str) -> None:
    """Also where it is the only one."""
    for module in small.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9)
    plain = small(ids, mask)["last_hidden_state"]
    assert torch.equal(small(ids, mask)["last_hidden_state"], plain)
    small.get_submodule(place).p = 0.5  # type: ignore[assignment]
    assert not torch.allclose(small(ids, mask)["last_hidden_state"], plain, atol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_autocast_ends_in_fp32_as_the_stock_modules_do(small: BertModel, dtype: torch.dtype, tolerance: float) -> None:
    """A half-precision result once broke course code: `.numpy()` has no bf16, and fp16 cannot hold a mask of -1e9."""
    ids, mask = torch.randint(1, 97, (6, 17)), masks(6, 17)
    exact = small(ids, mask)["last_hidden_state"]
    with torch.autocast("cpu", dtype):
        cast = small(ids, mask)["last_hidden_state"]
        encoded = small.encode(small.embed(ids), mask)
        assert small.stock(ids, mask).dtype == torch.float32
    for hidden in (cast, encoded):
        assert hidden.dtype == torch.float32
        assert not torch.equal(hidden, exact)
        torch.testing.assert_close(hidden, exact, atol=tolerance, rtol=tolerance)


@pytest.mark.ci
def test_sts_behaviour_of_real_weights(minilm: Path, shared_data: Path) -> None:
    """Mean-pooled MiniLM embeddings rank every fourth STS dev pair as published models of this kind do."""
    from scipy.stats import spearmanr

    from minbert_fast.data import Tokenizer, read_table

    table = read_table(shared_data / "sts-dev.csv", "similarity")
    tokenizer, model = Tokenizer.from_pretrained(minilm), BertModel.from_pretrained(minilm)
    sides = []
    for texts in (side[::4] for side in table.sentences):
        tokens = tokenizer.encode(texts, max_length=128)
        batch = pack([[tokens[i] for i in range(len(texts))]])
        with torch.no_grad():
            hidden = model(batch)["last_hidden_state"]
        offsets = batch.cu_seqlens.tolist()
        sides.append(torch.stack([hidden[a:b].mean(0) for a, b in itertools.pairwise(offsets)]))
    cosine = nn.functional.cosine_similarity(*sides)
    assert spearmanr(cosine.numpy(), table.labels[::4]).statistic == pytest.approx(0.832, abs=0.005)  # all pairs: 0.81
