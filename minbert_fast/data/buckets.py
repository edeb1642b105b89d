# SPDX-License-Identifier: Apache-2.0
"""The few sizes that packed batches are padded to, so that captured graphs of few shapes serve all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from minbert_fast.data.sampling import Sampler
from minbert_fast.data.tokens import Encoder, TokenTable

LOOKED_AT = 256  # steps whose sizes the buckets are chosen from
GRAIN = 64  # token capacities are multiples of it: whole tiles, and few distinct sizes
MARGIN = 1.05  # of the largest bucket over the largest step looked at, for those that were not
SENTENCE_LENGTHS = (64, 128, 256)  # bounds on sentence length: up to 64, attention takes its short path


@dataclass(frozen=True)
class Buckets:
    """The few sizes that batches are padded to, ascending, so that graphs of few shapes serve all batches.

    Each size of a batch becomes the smallest of its bucket sizes that holds it, and stays as it is where
    none does.
    """

    tokens: tuple[int, ...] = ()
    sentences: tuple[int, ...] = ()
    seqlen: tuple[int, ...] = ()  # the bound on sentence length


EXACT = Buckets()  # every batch keeps its own size


def choose_buckets(
    sampler: Sampler,
    tables: Mapping[str, TokenTable],
    max_length: int,
    encoders: Mapping[str, Encoder] = MappingProxyType({}),
    twins: Collection[str] = (),
    count: int = 4,
) -> Buckets:
    """Buckets for the batches that `sampler` draws: at most `count` token capacities with the least padding in all.

    Looks at the sizes of up to 256 steps spread over the first epoch.
    """
    lengths = {task: np.minimum(table.lengths(encoders.get(task, "bi")), max_length) for task, table in tables.items()}
    epoch = sampler.steps_per_epoch
    steps = np.unique(np.linspace(0, epoch - 1, min(LOOKED_AT, epoch)).astype(np.int64))
    totals, sentences = [], []
    for step in steps:
        rows = sampler.rows(0, int(step))
        drawn = [np.tile(lengths[task][each], 2 if task in twins else 1) for task, each in rows.items()]
        totals.append(sum(int(each.sum()) for each in drawn))
        sentences.append(sum(each.size for each in drawn))
    sizes = least_padding(np.array(totals), count)
    sizes[-1] = int(sizes[-1] * MARGIN)
    tokens = sorted({-(-size // GRAIN) * GRAIN for size in sizes})
    return Buckets(
        tokens=tuple(tokens),
        sentences=(max(sentences),),
        seqlen=(*(size for size in SENTENCE_LENGTHS if size < max_length), max_length),
    )


def least_padding(sizes: np.ndarray, count: int) -> list[int]:
    """At most `count` capacities, ascending, the last max(sizes), for which the sum of (capacity - size) is least.

    Exact, by dynamic programming over the sorted sizes: `best[i]` is the least sum of capacities that serves the
    i smallest ones with the capacities chosen so far.
    """
    ordered = np.sort(sizes)
    n = len(ordered)
    indices = np.arange(n + 1)
    best = np.concatenate([[0.0], np.full(n, np.inf)])
    choices = []
    for _ in range(min(count, n)):
        # cost[i, j]: the i smallest are served, the next capacity is the (i + j)th smallest and serves up to it.
        members = indices[None, 1:] - indices[:, None]
        cost = np.where(members > 0, best[:, None] + members * ordered[None, :], np.inf)
        choices.append(cost.argmin(axis=0))
        best = np.concatenate([[0.0], cost.min(axis=0)])
    found, end = [], n
    for choice in reversed(choices):
        if end == 0:
            break
        found.append(int(ordered[end - 1]))
        end = int(choice[end - 1])
    return sorted(set(found))
