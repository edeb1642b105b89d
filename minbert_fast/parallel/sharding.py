# SPDX-License-Identifier: Apache-2.0
"""Shards J, the moments and the optimizer step, so that each of R processes keeps 1/R of them.

The backward writes a layer's gradients into scratch memory; a reduce-scatter gives each process the sums of its own part,
while the backward writes the layer below into a second scratch. The two scratches alternate. Inner products over the parts
add up to the Gram matrix (an all-reduce of T x T numbers), so surgery sees what it would see in one process. Then each
process updates its part of the parameters and sends it to the others (all-gather). This is ZeRO's second stage
(Rajbhandari et al. 2020) with surgery in the middle.

Every process has the words' few gradient rows; their moments are sharded by rows. Heads are small and kept whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minbert_fast.common import huge_pages
from minbert_fast.parallel.exchange import AllReduce, Span
from minbert_fast.parallel.world import World
from minbert_fast.recipes.recipe import OptimizerOptions
from minbert_fast.step.flat import ALIGNMENT, FlatParameters, Piece, TaskGradients
from minbert_fast.step.optim import FlatAdamW

if TYPE_CHECKING:
    from torch.distributed import Work


class Shares:
    """Who has which elements of a span: equal parts, of whole cache lines (of the words: whole rows)."""

    def __init__(self, flat: FlatParameters, world: World) -> None:
        self.flat = flat
        self.world = world

    def size(self, span: Span) -> int:
        """Elements of a part; the last parts may have fewer that count, or none."""
        grain = ALIGNMENT
        if span.run.label == "words" and self.flat.words is not None:
            grain *= self.flat.words.shape[1]
        return -(-(span.end - span.begin) // (grain * self.world.size)) * grain

    def own(self, span: Span, at: int) -> Piece:
        """This process's part of a span, kept from `at` on."""
        size = self.size(span)
        begin = min(span.begin + self.world.rank * size, span.end)
        return Piece(span.run, begin, min(begin + size, span.end), at)


class ShardedGradients(TaskGradients):
    """J [T, shared / R], and scratch memory [T, ...] for the backward: for even layers, for odd ones, and for the rest.

    Scratch holds a layer's spans end to end, each as long as all processes' parts of it together.
    """

    def __init__(
        self, flat: FlatParameters, tasks: int, dtype: torch.dtype, spans: Sequence[Sequence[Span]], shares: Shares
    ) -> None:
        super().__init__(flat, 0, dtype)
        self.tasks = tasks
        self._world = shares.world
        self.offsets: dict[Span, int] = {}  # of each span's part in J
        self._places: list[tuple[Span, Tensor]] = []  # each span's room in scratch
        kept = 0
        lengths = [sum(shares.size(span) for span in group) * shares.world.size for group in spans]
        layers, device = lengths[:-1], flat.data.device
        rooms = [max(layers[0::2], default=0), max(layers[1::2], default=0), lengths[-1]]
        self._memory = [huge_pages.zeros(tasks, room, dtype=dtype, device=device) for room in rooms]
        self._scratch = [self._memory[i % 2][:, :length] for i, length in enumerate(layers)] + [self._memory[2]]
        for group, scratch in zip(spans, self._scratch, strict=True):
            at = 0
            for span in group:
                self.offsets[span] = kept
                room = shares.size(span) * shares.world.size
                self._places.append((span, scratch[:, at : at + room]))
                kept += shares.size(span)
                at += room
        self.J = huge_pages.zeros(tasks, kept, dtype=dtype, device=device)

    def scratch(self, number: int) -> Tensor:
        """The scratch memory of layer `number` (after the last layer: of the rest)."""
        return self._scratch[number]

    def scratch_of(self, span: Span) -> Tensor:
        """The scratch memory that a backward writes the gradients of `span` to: [T, length of all parts]."""
        return next(room for place, room in self._places if place == span)

    def view(self, parameter: Tensor) -> Tensor:
        return self.stacked([parameter]).view(self.tasks, *parameter.shape)

    def stacked(self, parameters: Sequence[Tensor]) -> Tensor:
        slots = [self.flat.slot(p) for p in parameters]
        begin, end = slots[0].begin, slots[-1].end
        span, room = next((s, room) for s, room in self._places if s.begin <= begin and end <= s.end)
        flat = room[:, begin - span.begin : end - span.begin]
        rows: Tensor = flat.unflatten(-1, (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:]))
        return rows

    def gram(self, words: Tensor | None) -> Tensor:
        # Every process has the words' rows: one of them counts these.
        gram = super().gram(words if self._world.is_main else None)
        self._world.reduce(gram)
        return gram


class ReduceScatter(AllReduce):
    """Leaves each process its part of every span's sums (reduce-scatter), of the words' rows and of the moments."""

    gradients: ShardedGradients

    def _allocate(self, rows: int, dtype: torch.dtype) -> ShardedGradients:
        self.shares = Shares(self.flat, self.world)
        return ShardedGradients(self.flat, rows, dtype, self.spans, self.shares)

    def optimizer(self, options: OptimizerOptions) -> FlatAdamW:
        pieces = self.flat.pieces()
        shared = list(itertools.chain.from_iterable(self.spans))
        words = [Span(piece.run, piece.begin, piece.end) for piece in pieces if piece.run.label == "words"]
        self._divided = shared + words
        own = [self.shares.own(span, self.gradients.offsets[span]) for span in shared]
        at = self.gradients.J.shape[1]
        for span in words:
            own.append(self.shares.own(span, at))
            at += self.shares.size(span)
        for piece in pieces:
            if piece.run.label not in ("shared", "words"):
                own.append(Piece(piece.run, piece.begin, piece.end, at))
                at += piece.end - piece.begin
        return ShardedAdamW(self.flat, options, own, self._unite_all)

    def before_backward(self) -> None:
        super().before_backward()
        self._sent: dict[int, list[Work | None]] = {}

    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        """Sends the parameters that this process has updated, and receives the others'."""
        self._unite_all(self.flat.data)
        self.flat.refresh()

    def _unite_all(self, buffer: Tensor) -> None:
        """Fills the divided regions of `buffer` [trainable or more] in every process with each process's part."""
        for span in self._divided:
            self._unite(buffer, span)

    def _unite(self, buffer: Tensor, span: Span) -> None:
        size, own = self.shares.size(span), self.shares.own(span, 0)
        part = buffer.new_zeros(size)
        part[own.kept] = buffer[own.begin : own.end]
        union = buffer.new_empty(size * self.world.size)
        self.world.finish([self.world.begin_union(part, union)])
        buffer[span.begin : span.end] = union[: span.end - span.begin]

    def _send(self, number: int) -> None:
        works = []
        for span in self.spans[number]:
            at, size = self.gradients.offsets[span], self.shares.size(span)
            for total, kept in zip(self.gradients.scratch_of(span), self.gradients.J, strict=True):
                works.append(self.world.begin_share(total, kept[at : at + size]))
        self._sent[number] = works
        self._begun += works
        # The backward writes layer number - 1 next, into the scratch memory of layer number + 1: wait for that one's sums
        # and clear the scratch, because gaps between parameters must be zero.
        if 0 < number < len(self.spans) - 1:
            self.world.finish(self._sent.get(number + 1, []) if number + 1 < len(self.spans) - 1 else [])
            self.gradients.scratch(number - 1).zero_()


class ShardedAdamW(FlatAdamW):
    """`FlatAdamW` over the pieces of one process; `unite` fills a buffer with every process's part."""

    def __init__(
        self,
        flat: FlatParameters,
        options: OptimizerOptions,
        pieces: Sequence[Piece],
        unite: Callable[[Tensor], None],
    ) -> None:
        super().__init__(flat, options, pieces)
        self._unite = unite

    def whole(self, kept: Tensor) -> Tensor:
        """The moments of all processes. A collective: every process must call it."""
        full = torch.zeros(self.flat.trainable_end, device=kept.device)
        for piece in self.pieces:
            full[piece.begin : piece.end] = kept[piece.kept]
        self._unite(full)
        return full
