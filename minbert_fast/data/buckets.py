# SPDX-License-Identifier: Apache-2.0
"""Bucket sizes: packed batches are padded to few sizes, so that few captured graphs or compiled products serve them all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokens import Encoder, TokenTable

SAMPLED_STEPS = 256  # the buckets are chosen from the sizes of this many steps
TOKEN_MULTIPLE = 64  # token capacities are multiples of it: whole tiles, and few distinct sizes
MARGIN = 1.05  # the largest bucket exceeds the largest sampled step by this factor
SENTENCE_LENGTHS = (64, 128, 256)  # bounds on sentence length; up to 64, attention uses its short kernel


@dataclass(frozen=True)
class Buckets:
    """The sizes that batches are padded to, ascending.

    Each size of a batch is rounded up to the smallest bucket that holds it; a size above all buckets is not padded.
    """

    tokens: Sequence[int] = ()
    sentences: Sequence[int] = ()
    seqlen: Sequence[int] = ()  # bound on sentence length


EXACT = Buckets()  # no padding
# For CPUs in bf16: oneDNN compiles each product anew for each number of rows (common/onednn_cache.py).
ROUNDED = Buckets(tokens=range(TOKEN_MULTIPLE, 1 << 20, TOKEN_MULTIPLE))


def choose_buckets(
    sampler: Sampler,
    tables: Mapping[str, TokenTable],
    max_length: int,
    encoders: Mapping[str, Encoder] = MappingProxyType({}),
    duplicated: Collection[str] = (),
    count: int = 4,
) -> Buckets:
    """Buckets for the batches of `sampler`: at most `count` token capacities that minimise the total padding.

    They are chosen from up to 256 steps of the first epoch, evenly spaced.
    """
    lengths = {task: np.minimum(table.lengths(encoders.get(task, "bi")), max_length) for task, table in tables.items()}
    epoch = sampler.steps_per_epoch
    steps = np.unique(np.linspace(0, epoch - 1, min(SAMPLED_STEPS, epoch)).astype(np.int64))
    totals, sentences = [], []
    for step in steps:
        rows = sampler.rows(int(step))
        drawn = [np.tile(lengths[task][each], 2 if task in duplicated else 1) for task, each in rows.items()]
        totals.append(sum(int(each.sum()) for each in drawn))
        sentences.append(sum(each.size for each in drawn))
    sizes = choose_capacities(np.array(totals), count)
    sizes[-1] = int(sizes[-1] * MARGIN)
    tokens = sorted({-(-size // TOKEN_MULTIPLE) * TOKEN_MULTIPLE for size in sizes})
    return Buckets(
        tokens=tuple(tokens),
        sentences=(max(sentences),),
        seqlen=(*(size for size in SENTENCE_LENGTHS if size < max_length), max_length),
    )


def choose_capacities(sizes: np.ndarray, count: int) -> list[int]:
    """At most `count` capacities, ascending, that minimise the sum of (capacity - size); the last one is max(sizes).

    Exact, by dynamic programming over the sorted sizes: `best[i]` is the smallest sum of capacities that holds the i
    smallest sizes with the capacities chosen so far.
    """
    ordered = np.sort(sizes)
    n = len(ordered)
    indices = np.arange(n + 1)
    best = np.concatenate([[0.0], np.full(n, np.inf)])
    choices = []
    for _ in range(min(count, n)):
        # cost[i, j]: earlier capacities hold the i smallest sizes; the next one is the j-th smallest size (from 0).
        members = indices[None, 1:] - indices[:, None]
        cost = np.where(members > 0, best[:, None] + members * ordered[None, :], np.inf)
        choices.append(cost.argmin(axis=0))
        best = np.concatenate([[0.0], cost.min(axis=0)])
    capacities, end = set(), n
    for choice in reversed(choices):
        if end == 0:
            break
        capacities.add(int(ordered[end - 1]))
        end = int(choice[end - 1])
    return sorted(capacities)
