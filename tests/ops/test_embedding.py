# SPDX-License-Identifier: Apache-2.0
"""embedding on every floor: output and every gradient against fp64, by task; words row-sparse."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.model.packing import PackedBatch, pack
from minbert_fast.ops import backend
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.embedding import reference
from tests import tolerance
from tests.ops.common import DTYPES, EPS, P, Slices, check_by_task, random

WORDS, POSITIONS, TYPES = 50, 20, 2

# Sentence lengths of each task.
BATCHES: dict[str, list[list[int]]] = {
    "three tasks": [[5, 3, 17], [9, 1], [4, 4, 4]],
    "empty first": [[], [7, 2], [11]],
    "empty last": [[7, 2], [11], []],
    "one token": [[1]],
    "full length": [[POSITIONS, 2]],
    "many sentences": [[2] * 19, [1] * 9],
}


@dataclass(frozen=True)
class Case:
    """A packed batch, embedding tables, and the op's results for them."""

    batch: PackedBatch
    tables: dict[str, Tensor]
    dy: Tensor
    seed: Tensor
    p: float

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.batch.tokens, self.batch.positions, self.batch.types

    def formula(self, keep: Tensor | float = 1.0, **tables: Tensor) -> Tensor:
        return reference(*self.indices, **tables, eps=EPS, keep=keep)

    def run(self, padding: int = -1, **views: Tensor) -> Tensor:
        """y [N, H]; the tables' gradients go into `views` (word, position, type_, gamma, beta)."""
        batch = self.batch
        where = (batch.task_tokens, batch.cu_seqlens, batch.word_order, batch.word_offsets)
        sink = ops.EmbeddingSink(*where, *(views.get(name) for name in self.tables), padding=padding)
        y = ops.embedding(*self.indices, *self.tables.values(), EPS, self.p, self.seed, 2, sink)
        y.backward(self.dy)
        return y.detach()


def case(lengths: list[list[int]], width: int, p: float, dtype: torch.dtype, device: torch.device) -> Case:
    rng = np.random.default_rng(width)
    # Squared, so that some words are frequent; the first of each sentence is the same, as [CLS] is.
    sentences = [[(rng.random(n) ** 3 * WORDS).astype(int) for n in task] for task in lengths]
    for sentence in itertools.chain.from_iterable(sentences):
        sentence[0] = 1
    types = [[rng.integers(0, TYPES, n) for n in task] for task in lengths]
    tokens, count = sum(map(sum, lengths)), sum(map(len, lengths))
    batch = pack(sentences, types, token_capacity=tokens + 3, sentence_capacity=count + 2).to(device)
    batch = replace(batch, word_offsets=batch.word_offsets[: batch.num_words + 3])  # two words that do not occur
    generator = torch.Generator().manual_seed(width)
    shapes = {
        "word": (WORDS, width),
        "position": (POSITIONS, width),
        "type_": (TYPES, width),
        "gamma": (width,),
        "beta": (width,),
    }
    tables = {n: random(*s, dtype=dtype, device=device, generator=generator) for n, s in shapes.items()}
    dy = random(tokens + 3, width, dtype=dtype, device=device, generator=generator)
    return Case(batch, tables, dy, torch.tensor([width], device=device), p)


def check(lengths: list[list[int]], width: int, p: float, dtype: torch.dtype, device: torch.device) -> None:
    it = case(lengths, width, p, dtype, device)
    tasks, distinct = len(lengths), it.batch.word_offsets.numel() - 1
    keep = keep_mask(it.seed, 2, torch.arange(len(it.dy), device=device), width, p)
    shapes = {n: tuple(t.shape) for n, t in it.tables.items()} | {"word": (distinct, width)}
    slices = Slices(tasks, shapes, torch.float32, device)
    y = it.run(**slices.views)
    slices.assert_gaps_untouched()

    ids = it.batch.word_ids[: it.batch.num_words].long()
    dense = torch.zeros(tasks, WORDS, width, device=device)
    dense[:, ids] = slices.views["word"][:, : len(ids)]
    assert not slices.views["word"][:, len(ids) :].any()

    bounds = it.batch.task_tokens.tolist()
    check_by_task(it.formula, it.tables, it.dy, bounds, {}, slices.views | {"word": dense}, keep=keep)
    tolerance.reference(it.formula, it.tables, keep=keep).check([y])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "p"), [(3, P), (100, 0.0), (100, P)])
def test_within_the_error_budget(width: int, dtype: torch.dtype, p: float, every_device: torch.device) -> None:
    if dtype == torch.bfloat16 and backend.implementation(torch.empty(0)) == "triton" and every_device.type == "cpu":
        pytest.skip("the interpreter truncates dz to bf16, and sums of it drift; test_forward_in_bf16 remains")
    check(BATCHES["three tasks"], width, p, dtype, every_device)


def test_fp16(triton: torch.device) -> None:
    check(BATCHES["three tasks"], 100, P, torch.float16, triton)


def test_forward_in_bf16(triton: torch.device) -> None:
    it = case(BATCHES["three tasks"], 64, 0.0, torch.bfloat16, triton)
    tolerance.reference(it.formula, it.tables).check([it.run()])


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_awkward_batches(lengths: list[list[int]], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.triton_available():  # "many sentences" are more than a program searches at once
        monkeypatch.setattr("minbert_fast.kernels.embedding.GATHER_SCAN", 16)
    check(lengths, 36, P, torch.float32, device)


def test_wider_than_a_gather_tile(triton: torch.device) -> None:
    check([[3, 2], [4]], 1040, 0.0, torch.float32, triton)


def test_deterministic(device: torch.device) -> None:
    it = case(BATCHES["empty first"], 64, P, torch.float32, device)
    distinct = it.batch.word_offsets.numel() - 1
    first, second = (torch.empty(3, distinct, 64, device=device) for _ in range(2))
    it.run(word=first)
    it.run(word=second)
    assert torch.equal(first, second)


@pytest.mark.parametrize("lengths", [[[5, 3, 17], [9, 1]], [[3] * 12]], ids=["rare", "frequent"])
def test_the_padding_word_gets_no_gradient(lengths: list[list[int]], device: torch.device) -> None:
    it = case(lengths, 36, 0.0, torch.float32, device)
    distinct = it.batch.word_offsets.numel() - 1
    usual, without = (torch.empty(len(lengths), distinct, 36, device=device) for _ in range(2))
    it.run(word=usual)
    it.run(word=without, padding=1)
    place = it.batch.word_ids.tolist().index(1)
    assert usual[:, place].any()
    usual[:, place] = 0
    assert torch.equal(usual, without)


def test_only_the_wanted_gradients(device: torch.device) -> None:
    it = case(BATCHES["empty first"], 64, 0.0, torch.float32, device)
    everything = Slices(3, {"position": (POSITIONS, 64), "beta": (64,)}, torch.float32, device)
    it.run(**everything.views)
    alone = torch.empty(3, POSITIONS, 64, device=device)
    it.run(position=alone)
    assert torch.equal(alone, everything.views["position"])


def test_plain_autograd_adds_no_rows_by_atomics() -> None:
    """On a GPU, index_add_ and scatter_add_ add in another order each time: two runs would give different weights."""
    it = case(BATCHES["three tasks"], 64, 0.0, torch.float32, torch.device("cpu"))
    tables = [table.requires_grad_() for table in it.tables.values()]
    y = ops.embedding(*it.indices, *tables, EPS)
    with torch.profiler.profile() as profile:
        y.backward(it.dy)
    called = {event.key for event in profile.key_averages()}
    assert "aten::embedding_dense_backward" in called
    assert not {name for name in called if name.startswith(("aten::index_add", "aten::scatter", "aten::index_select"))}


def test_too_many_types_are_refused(triton: torch.device) -> None:
    it = case(BATCHES["one token"], 64, 0.0, torch.float32, triton)
    it.tables["type_"] = torch.zeros(9, 64, device=triton)
    with pytest.raises(ValueError, match="at most 8 token types"):
        it.run()


@pytest.mark.usefixtures("native")
def test_many_chunks_of_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, POSITIONS + 1, count).tolist() for count in (60, 1, 150)]
    check(lengths, 33, P, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_dropout_is_the_documented_stream_bit_for_bit(seed: int, every_device: torch.device) -> None:
    """gamma 0 and beta 1 leave the mask alone; p = 0.5, as a GPU may round 1 / (1 - p) another way."""
    rows, width = 19, 100
    zeros, table = torch.zeros(rows, dtype=torch.int32, device=every_device), torch.zeros(1, width, device=every_device)
    nothing, one = torch.zeros(width, device=every_device), torch.ones(width, device=every_device)
    key = torch.tensor([seed], device=every_device)
    y = ops.embedding(zeros, zeros, zeros, table, table, table, nothing, one, 1e-5, 0.5, key, 7)
    assert torch.equal(y, keep_mask(key, 7, torch.arange(rows, device=every_device), width, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("width", [384, 768])
def test_real_sizes(width: int, dtype: torch.dtype, triton: torch.device) -> None:
    rng = np.random.default_rng(0)
    check([rng.integers(1, POSITIONS + 1, 40).tolist() for _ in range(3)], width, P, dtype, triton)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["word", "position", "type"])
@pytest.mark.parametrize("beyond", [False, True])
def test_an_index_that_its_table_does_not_have(place: int, beyond: bool, kernels: torch.device) -> None:
    """A GPU cannot refuse it, and its kernel read other memory: other words' rows, or none of the model's."""
    it = case([[5, 3], [4]], 24, 0.0, torch.float32, kernels)
    healthy = it.run()
    it.indices[place][6] = (WORDS, POSITIONS, TYPES)[place] if beyond else -1
    if backend.implementation(it.dy) == "native":
        with pytest.raises(ValueError, match=r"which is not in \[0, "):
            it.run()
        return
    dgamma = torch.zeros(2, 24, device=kernels)
    found = it.run(gamma=dgamma)
    assert found[6].isnan().all()
    others = [row for row in range(len(found)) if row != 6]
    assert torch.equal(found[others], healthy[others])
    assert dgamma[0].isnan().all()
    assert dgamma[1].isfinite().all()
