# SPDX-License-Identifier: Apache-2.0
"""Batches for the benchmarks: real sentences if data and tokenizer are available, else random words in real lengths.

`MINBERT_FAST_DATA` (default: ../shared/data next to the checkout) is the directory of the course's data, and
`MINBERT_FAST_MINILM` a model directory with a tokenizer. Without them, lengths follow the histograms in `lengths.json`,
counted on the same data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import ROOT
from minbert_fast.data import Tokenizer, read_table
from minbert_fast.data.batch import MultitaskBatch
from minbert_fast.data.formats import FORMATS
from minbert_fast.model.packing import pack
from minbert_fast.tasks import MultitaskModel

STEMS = {"sentiment": "sst", "paraphrase": "quora", "similarity": "sts"}  # keys of lengths.json
VOCABULARY_SIZE = 30_522


@cache
def sentence_pools() -> tuple[str, dict[str, list[list[np.ndarray]]]]:
    """A description of the sentences, and by kind of task one list of tokenized sentences per column."""
    data = Path(os.environ.get("MINBERT_FAST_DATA", ROOT.parent / "shared" / "data"))
    vocabulary = os.environ.get("MINBERT_FAST_MINILM")
    if not (data.is_dir() and vocabulary):
        return "words at random, lengths as in the course's data", {kind: _random_sentences(kind) for kind in STEMS}
    tokenizer = Tokenizer.from_pretrained(Path(vocabulary))
    found = {}
    for kind in STEMS:
        table = read_table(data / f"{FORMATS[kind].stem}-train.csv", kind)
        encoded = [tokenizer.encode(column[:4000], 128) for column in table.sentences]
        found[kind] = [[tokens[i] for i in range(len(tokens))] for tokens in encoded]
    return "real sentences", found


def _random_sentences(kind: str) -> list[list[np.ndarray]]:
    counts = np.array(json.loads((ROOT / "benchmarks" / "lengths.json").read_text())[STEMS[kind]])
    rng = np.random.default_rng(0)
    columns = []
    for _ in range(FORMATS[kind].arity):
        lengths = rng.choice(len(counts), size=4000, p=counts / counts.sum())
        columns.append([rng.integers(1000, VOCABULARY_SIZE, n, dtype=np.int32) for n in lengths])
    return columns


def make_batches(
    model: MultitaskModel, count: int, examples: int = 32, token_capacity: int | None = None
) -> list[MultitaskBatch]:
    """`count` batches with `examples` examples per task; the same ones in every call."""
    rng = np.random.default_rng(1)
    return [_make_batch(model, examples, token_capacity, rng) for _ in range(count)]


def _make_batch(
    model: MultitaskModel, examples: int, token_capacity: int | None, rng: np.random.Generator
) -> MultitaskBatch:
    sentences: list[Sequence[np.ndarray]] = []
    labels, rows = {}, {}
    for name, task in model.tasks.items():
        columns = sentence_pools()[1][task.preset]
        drawn = rng.integers(0, min(len(column) for column in columns), examples)
        sentences.append([column[i] for column in columns for i in drawn])
        high = {"sentiment": 5, "paraphrase": 2, "similarity": 6}[task.preset]
        values = torch.from_numpy(rng.integers(0, high, examples))
        labels[name] = values if task.preset == "sentiment" else values.float()
        rows[name] = drawn
    packed = pack(sentences, token_capacity=token_capacity)
    return MultitaskBatch(packed, tuple(model.tasks), {n: t.arity for n, t in model.tasks.items()}, labels, rows)
