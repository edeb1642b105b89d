# SPDX-License-Identifier: Apache-2.0
"""Ranks as threads of one process: every message arrives, without torchrun.

Torch's generators belong to all threads, so models must not draw dropout from them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minbert_fast.parallel.world import World


class Meeting:
    """Where the threads hand their messages over."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self._told: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks."""
        self._told[rank] = value
        self.barrier.wait()
        found = list(self._told)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Thread(World):
    """A rank whose messages are answered at once."""

    meeting: Meeting = field(kw_only=True)

    def _sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        told = self.meeting.exchange(self.rank, [t.clone() for t in tensors])
        return [torch.stack(each).sum(0) for each in zip(*told, strict=True)]

    def begin_sum(self, tensors: Sequence[Tensor]) -> None:
        for tensor, total in zip(tensors, self._sums(tensors), strict=True):
            tensor.copy_(total)

    def begin_share(self, tensors: Sequence[Tensor], shares: Sequence[Tensor]) -> None:
        for share, total in zip(shares, self._sums(tensors), strict=True):
            share.copy_(total.view(self.size, -1)[self.rank])

    def begin_union(self, share: Tensor, tensor: Tensor) -> None:
        tensor.copy_(torch.cat(self.meeting.exchange(self.rank, share.clone())))


def side_by_side(size: int, work: Callable[[World], Any]) -> list[Any]:
    """work(world) of each rank."""
    meeting, results, errors = Meeting(size), [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Thread(rank, size, meeting=meeting))
        except Exception as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
