# SPDX-License-Identifier: Apache-2.0
"""Which exchange of gradients a step takes part in."""

from __future__ import annotations

from functools import partial

from minbert_fast.parallel.exchange import AllReduce
from minbert_fast.parallel.sharding import ReduceScatter
from minbert_fast.parallel.world import World
from minbert_fast.step.hooks import Connect


def connect(world: World, shard: bool) -> Connect | None:
    """What `OnePassStep` makes its exchange with; None for one process. `shard`: each process keeps a part of J."""
    if world.size == 1:
        return None
    return partial(ReduceScatter if shard else AllReduce, world)
