# SPDX-License-Identifier: Apache-2.0
"""Shards J, the moments and the optimizer step, so that each of R processes keeps 1/R of them.

The backward writes a layer's gradients into scratch memory. A reduce-scatter gives each process the sums of one part, while
the backward writes the layer below into a second scratch memory. The two alternate. The inner products over the parts add up
to the Gram matrix (an all-reduce of T x T numbers), so surgery has the same input as in one process. Then each process
updates its part of the parameters and sends it to the others (all-gather). This is ZeRO's second stage (Rajbhandari et al.
2020) with surgery in the middle.

Every process has all gradient rows of the words, and the moments of a part of the rows. Every process has all of the heads,
which are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minbert_fast.common import huge_pages
from minbert_fast.parallel.exchange import AllReduce, Span, spans
from minbert_fast.parallel.world import World
from minbert_fast.recipes.sections import OptimizerOptions
from minbert_fast.step.flat import ALIGNMENT, FlatParameters, TaskGradients, UpdateRange
from minbert_fast.step.hooks import Connect
from minbert_fast.step.optim import FlatAdamW

if TYPE_CHECKING:
    from torch.distributed import Work


@dataclass(frozen=True)
class Shares:
    """Divides each span into equal parts, one per process. A part is whole cache lines; of the words, whole rows."""

    flat: FlatParameters
    world: World

    def size(self, span: Span) -> int:
        """Elements of one part. The last parts may reach past the end of the span."""
        grain = ALIGNMENT
        if span.group.label == "words" and self.flat.words is not None:
            grain *= self.flat.words.shape[1]
        return -(-(span.end - span.begin) // (grain * self.world.size)) * grain

    def own(self, span: Span, at: int) -> UpdateRange:
        """This process's part of a span. Its moments start at element `at`."""
        size = self.size(span)
        begin = min(span.begin + self.world.rank * size, span.end)
        return UpdateRange(span.group, begin, min(begin + size, span.end), at)


class ShardedGradients(TaskGradients):
    """J [T, shared / R], and the scratch memory that the backward writes: for even layers, odd layers, and the rest.

    Scratch [T, room] holds the spans of one layer, one after another. A span's room is R times the size of its part.
    Elements between parameters, and behind a span, are zero when it is sent: they enter the Gram matrix.
    """

    def __init__(self, tasks: int, dtype: torch.dtype, spans: Sequence[Sequence[Span]], shares: Shares) -> None:
        super().__init__(shares.flat, 0, dtype)
        self.tasks = tasks
        self._world = shares.world
        self.offsets: dict[Span, int] = {}  # element of J where this process's part of a span starts
        self.rooms: dict[Span, Tensor] = {}  # scratch memory [T, room] that the backward writes a span to
        kept = 0
        lengths = [sum(shares.size(span) for span in group) * shares.world.size for group in spans]
        layers, device = lengths[:-1], shares.flat.data.device
        rooms = [max(layers[0::2], default=0), max(layers[1::2], default=0), lengths[-1]]
        self._memory = [huge_pages.zeros(tasks, room, dtype=dtype, device=device) for room in rooms]
        # The scratch memory of each layer, then of the rest.
        self.scratch = [self._memory[i % 2][:, :length] for i, length in enumerate(layers)] + [self._memory[2]]
        for group, scratch in zip(spans, self.scratch, strict=True):
            at = 0
            for span in group:
                self.offsets[span] = kept
                room = shares.size(span) * shares.world.size
                self.rooms[span] = scratch[:, at : at + room]
                kept += shares.size(span)
                at += room
        self.J = huge_pages.zeros(tasks, kept, dtype=dtype, device=device)

    def view(self, parameter: Tensor) -> Tensor:
        return self._columns([parameter]).view(self.tasks, *parameter.shape)

    def stacked(self, parameters: Sequence[Tensor]) -> Tensor:
        rows = sum(p.shape[0] for p in parameters)
        view: Tensor = self._columns(parameters).unflatten(-1, (rows, *parameters[0].shape[1:]))
        return view

    def _columns(self, parameters: Sequence[Tensor]) -> Tensor:
        """The scratch memory [T, elements] of adjacent parameters."""
        begin, end = self.flat.placement(parameters[0]).begin, self.flat.placement(parameters[-1]).end
        span, room = next((s, room) for s, room in self.rooms.items() if s.begin <= begin and end <= s.end)
        return room[:, begin - span.begin : end - span.begin]

    def gram(self, words: Tensor | None) -> Tensor:
        # Every process has all rows of the words; only rank 0 adds their inner products.
        gram = super().gram(words if self._world.is_main else None)
        self._world.reduce(gram)
        return gram


class ReduceScatter(AllReduce):
    """Gives each process its part of every span's sums (reduce-scatter). It keeps the moments of this part alone."""

    gradients: ShardedGradients

    def __init__(
        self, world: World, gradients: ShardedGradients, spans: Sequence[Sequence[Span]], shares: Shares
    ) -> None:
        super().__init__(world, gradients, spans)
        self.shares = shares
        self._shared = list(itertools.chain.from_iterable(spans))
        self._words = [Span(r.group, r.begin, r.end) for r in self.flat.update_ranges() if r.group.label == "words"]
        self._sent: dict[int, Work | None] = {}

    def optimizer(self, options: OptimizerOptions) -> FlatAdamW:
        own = [self.shares.own(span, self.gradients.offsets[span]) for span in self._shared]
        at = self.gradients.J.shape[1]
        for span in self._words:
            own.append(self.shares.own(span, at))
            at += self.shares.size(span)
        for head in self.flat.update_ranges():
            if head.group.label not in ("shared", "words"):
                own.append(replace(head, at=at))
                at += head.end - head.begin
        return ShardedAdamW(self.flat, options, own, self._gather)

    def before_backward(self) -> None:
        super().before_backward()
        self._sent.clear()
        if len(self.spans) > 1:
            self.gradients.scratch[-2].zero_()  # of the last layer; `_send` clears those below

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        """Sends the parameters that this process has updated to the others, and receives theirs."""
        self._gather(self.flat.data)
        self.flat.refresh()

    def _gather(self, buffer: Tensor) -> None:
        """Fills the divided regions of `buffer` [trainable or more] in every process with each process's part."""
        for span in self._shared + self._words:
            size, own = self.shares.size(span), self.shares.own(span, 0)
            part = buffer.new_zeros(size)
            part[own.kept] = buffer[own.begin : own.end]
            union = buffer.new_empty(size * self.world.size)
            self.world.finish([self.world.begin_union(part, union)])
            buffer[span.begin : span.end] = union[: span.end - span.begin]

    def _send(self, number: int) -> None:
        """Starts the sums of all rows of a layer, in one message."""
        totals: list[Tensor] = []
        shares: list[Tensor] = []
        for span in self.spans[number]:
            at, size = self.gradients.offsets[span], self.shares.size(span)
            totals += self.gradients.rooms[span]
            shares += self.gradients.J[:, at : at + size]
        self._sent[number] = self.world.begin_share(totals, shares)
        self._begun.append(self._sent[number])
        # The backward next writes layer `number` - 1 into the scratch memory of layer `number` + 1. Wait for the sums of
        # that layer, then clear its scratch: the gaps between parameters must be zero.
        if 0 < number < len(self.spans) - 1:
            self.world.finish([self._sent.get(number + 1)])  # of the last layer: None
            self.gradients.scratch[number - 1].zero_()


class ShardedAdamW(FlatAdamW):
    """`FlatAdamW` over the ranges of one process. `gather` fills a buffer [trainable] with every process's part."""

    def __init__(
        self,
        flat: FlatParameters,
        options: OptimizerOptions,
        ranges: Sequence[UpdateRange],
        gather: Callable[[Tensor], None],
    ) -> None:
        super().__init__(flat, options, ranges)
        self._gather = gather

    def whole(self, kept: Tensor) -> Tensor:
        """The moments of all trainable elements. Every process must call it, since it communicates."""
        full = torch.zeros(self.flat.trainable_end, device=kept.device)
        for owned in self.ranges:
            full[owned.begin : owned.end] = kept[owned.kept]
        self._gather(full)
        return full


def connect(world: World, shard: bool) -> Connect | None:
    """The function by which `OnePassStep` makes its exchange; None for one process. With `shard`, each keeps a part of J."""

    def make(
        flat: FlatParameters, rows: int, dtype: torch.dtype, layers: Sequence[Sequence[nn.Parameter]]
    ) -> AllReduce:
        cut = spans(flat, layers)
        if not shard:
            return AllReduce(world, TaskGradients(flat, rows, dtype), cut)
        shares = Shares(flat, world)
        return ReduceScatter(world, ShardedGradients(rows, dtype, cut, shares), cut, shares)

    return make if world.size > 1 else None
