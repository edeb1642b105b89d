# SPDX-License-Identifier: Apache-2.0
"""embedding kernels: output and every gradient against fp64, by task; words row-sparse, positions by sentence."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minbert_fast.kernels.embedding import embedding_forward, embedding_gather, embedding_norm_backward
from minbert_fast.model.packing import PackedBatch, pack
from minbert_fast.ops import reference as plain
from minbert_fast.ops.dropout import keep_mask
from tests.kernels.task_gradients import DTYPES, Slices, check_by_task, random
from tests.tolerance import reference

EPS = 1e-12
P = 0.2  # 1 / (1 - p) = 1.25 is exact in every dtype
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
    """A packed batch with tables, and what the kernels make of them."""

    batch: PackedBatch
    tables: dict[str, Tensor]
    dy: Tensor
    seed: Tensor
    p: float

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.batch.tokens, self.batch.positions, self.batch.types

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return embedding_forward(*self.indices, *self.tables.values(), EPS, self.p, self.seed, 2)

    def formula(self, keep: Tensor | None = None, **tables: Tensor) -> Tensor:
        return plain.embedding(*self.indices, **tables, eps=EPS, keep=keep)

    def backward(self, **outputs: Tensor | None) -> None:
        _, mean, rstd = self.forward()
        tables = [self.tables[n] for n in ("word", "position", "type_", "gamma")]
        small = (outputs.get(n) for n in ("gamma", "beta", "type_"))
        bounds = self.batch.task_tokens
        dz = embedding_norm_backward(self.dy, *self.indices, *tables, mean, rstd, bounds, self.p, self.seed, 2, *small)
        assert not dz[self.batch.num_tokens :].any()
        rows = (self.batch.cu_seqlens, self.batch.word_order, self.batch.word_offsets)
        embedding_gather(dz, bounds, *rows, outputs.get("word"), outputs.get("position"))


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
    it.backward(**slices.views)
    slices.assert_gaps_untouched()

    ids = it.batch.word_ids[: it.batch.num_words].long()
    dense = torch.zeros(tasks, WORDS, width, device=device)
    dense[:, ids] = slices.views["word"][:, : len(ids)]
    assert not slices.views["word"][:, len(ids) :].any()

    bounds = it.batch.task_tokens.tolist()
    check_by_task(it.formula, it.tables, it.dy, bounds, {}, slices.views | {"word": dense}, keep=keep)
    y, mean, rstd = it.forward()
    reference(it.formula, it.tables, keep=keep).check([y])
    assert mean.dtype == rstd.dtype == torch.float32
    assert torch.isfinite(rstd).all()


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_within_the_error_budget(dtype: torch.dtype, p: float, device: torch.device) -> None:
    check(BATCHES["three tasks"], 100, p, dtype, device)


def test_forward_in_bf16(device: torch.device) -> None:
    """Gradients in bf16 wait for a GPU: the interpreter truncates dz to bf16, and sums of it drift."""
    it = case(BATCHES["three tasks"], 64, 0.0, torch.bfloat16, device)
    reference(it.formula, it.tables).check([it.forward()[0]])


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_awkward_batches(lengths: list[list[int]], device: torch.device) -> None:
    check(lengths, 36, P, torch.float32, device)


def test_wider_than_a_gather_tile(device: torch.device) -> None:
    check([[3, 2], [4]], 1040, 0.0, torch.float32, device)


def test_deterministic(device: torch.device) -> None:
    it = case(BATCHES["three tasks"], 64, P, torch.float32, device)
    distinct = it.batch.word_offsets.numel() - 1
    first, second = (torch.empty(3, distinct, 64, device=device) for _ in range(2))
    it.backward(word=first)
    it.backward(word=second)
    assert torch.equal(first, second)


def test_only_the_wanted_gradients(device: torch.device) -> None:
    it = case(BATCHES["three tasks"], 64, 0.0, torch.float32, device)
    everything = Slices(3, {"position": (POSITIONS, 64), "beta": (64,)}, torch.float32, device)
    it.backward(**everything.views)
    alone = torch.empty(3, POSITIONS, 64, device=device)
    it.backward(position=alone)
    assert torch.equal(alone, everything.views["position"])


def test_too_many_types_are_refused(device: torch.device) -> None:
    it = case(BATCHES["one token"], 64, 0.0, torch.float32, device)
    it.tables["type_"] = torch.zeros(9, 64, device=device)
    with pytest.raises(ValueError, match="at most 8 token types"):
        it.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 768])
def test_real_sizes(width: int, dtype: torch.dtype, device: torch.device) -> None:
    rng = np.random.default_rng(0)
    check([rng.integers(1, POSITIONS + 1, 40).tolist() for _ in range(3)], width, P, dtype, device)
