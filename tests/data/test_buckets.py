# SPDX-License-Identifier: Apache-2.0
"""Bucket sizes: the padding is minimal (checked against every possible choice), and batches fit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from minbert_fast.data import Tokenizer, read_table, sample_directory
from minbert_fast.data.buckets import choose_buckets, choose_capacities
from minbert_fast.data.cache import tokenize_table
from minbert_fast.data.collate import Collator
from minbert_fast.data.sampling import Sampler


def padding(sizes: np.ndarray, capacities: tuple[int, ...]) -> int:
    return sum(min(c for c in capacities if c >= size) - int(size) for size in sizes)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("seed", range(4))
def test_padding_is_minimal(seed: int, count: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 40, 8)
    found = choose_capacities(sizes, count)
    assert found == sorted(found)
    assert len(found) <= count
    assert found[-1] == sizes.max()
    distinct = sorted({int(size) for size in sizes})
    choices = [(*rest, distinct[-1]) for n in range(count) for rest in itertools.combinations(distinct[:-1], n)]
    assert padding(sizes, tuple(found)) == min(padding(sizes, choice) for choice in choices)


@pytest.mark.parametrize("scheme", ["cycle", "each-once", "sequential"])
def test_sample_data_needs_few_sizes_and_little_padding(scheme: str) -> None:
    sample = sample_directory()
    tokenizer = Tokenizer.from_pretrained(sample.model)
    files = {"sentiment": "ids-sst-train.csv", "paraphrase": "quora-train.csv"}
    tables = {task: tokenize_table(read_table(sample.data / name, task), tokenizer) for task, name in files.items()}
    sampler = Sampler.from_tables(tables, 8, scheme)
    buckets = choose_buckets(sampler, tables, max_length=32, encoders={"paraphrase": "both"}, count=3)
    assert buckets.seqlen == (32,)
    assert len(buckets.tokens) <= 3
    collator = Collator(tables, 32, {"paraphrase": "both"}, buckets)
    batches = [collator(sampler.rows(step)) for step in range(sampler.steps_per_epoch)]
    assert {batch.packed.cu_seqlens.numel() - 1 for batch in batches} == set(buckets.sentences)
    assert {batch.packed.tokens.numel() for batch in batches} <= set(buckets.tokens)
    used = sum(batch.packed.num_tokens for batch in batches)
    assert sum(batch.packed.tokens.numel() for batch in batches) < 1.5 * used
    # Attention has faster kernels for short sentences.
    for longest, seqlen in ((64, (64,)), (100, (64, 100)), (256, (64, 128, 256)), (512, (64, 128, 256, 512))):
        assert choose_buckets(sampler, tables, max_length=longest).seqlen == seqlen
