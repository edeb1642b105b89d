# SPDX-License-Identifier: Apache-2.0
"""J, the moments and the optimizer step shared out among processes, so that what each keeps of them falls with their number.

Of every layer each of R processes keeps 1/R of J: a backward writes a layer's gradients into scratch memory, from which
each gets the sums of its own part (reduce-scatter), while the layer below is written into a second scratch; the layer
after that may have the first one again. Inner products over the parts add up to the Gram matrix (all-reduce of T x T
numbers), so surgery sees what it would see in one process. Then each process moves its part of the parameters and tells
the others (all-gather): ZeRO's second stage (Rajbhandari et al. 2020), with surgery in the middle.

The words' gradients are few rows, which every process has; their moments are shared out by rows. Heads are small: whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minbert_fast.common import huge_pages
from minbert_fast.parallel.exchange import Exchange, Span
from minbert_fast.parallel.world import World
from minbert_fast.step.flat import ALIGNMENT, FlatParameters, Piece, TaskGradients

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

    def room(self, span: Span) -> Tensor:
        """Where a backward writes the gradients of `span`: [T, the length of all parts]."""
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

    def zero(self) -> None:
        for memory in self._memory:
            memory.zero_()


class ShardedExchange(Exchange):
    """Of every span, and of the words' rows, one part in each process."""

    gradients: ShardedGradients

    def _room(self, tasks: int, dtype: torch.dtype) -> ShardedGradients:
        self.shares = Shares(self.flat, self.world)
        return ShardedGradients(self.flat, tasks, dtype, self.spans, self.shares)

    def _pieces(self) -> tuple[Piece, ...]:
        whole = self.flat.pieces()
        shared = list(itertools.chain.from_iterable(self.spans))
        words = [Span(piece.run, piece.begin, piece.end) for piece in whole if piece.run.label == "words"]
        self._divided = shared + words
        pieces = [self.shares.own(span, self.gradients.offsets[span]) for span in shared]
        at = self.gradients.J.shape[1]
        for span in words:
            pieces.append(self.shares.own(span, at))
            at += self.shares.size(span)
        for piece in whole:
            if piece.run.label not in ("shared", "words"):
                pieces.append(Piece(piece.run, piece.begin, piece.end, at))
                at += piece.end - piece.begin
        return tuple(pieces)

    def open(self) -> None:
        super().open()
        self._sent: dict[int, list[Work | None]] = {}

    def gram(self, words: Tensor | None) -> Tensor:
        gram = super().gram(words if self.world.is_main else None)  # every process has the words' rows: one counts them
        self.world.reduce(gram)
        return gram

    def spread(self) -> None:
        for span in self._divided:
            self._unite(self.flat.data, span)
        self.flat.refresh()

    def whole(self, kept: Tensor) -> Tensor:
        full = torch.zeros(self.flat.trainable_end, device=kept.device)
        for piece in self.pieces:
            full[piece.begin : piece.end] = kept[piece.kept]
        for span in self._divided:
            self._unite(full, span)
        return full

    def _unite(self, buffer: Tensor, span: Span) -> None:
        """Fills buffer[span] in every process with everyone's part of it."""
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
            for total, kept in zip(self.gradients.room(span), self.gradients.J, strict=True):
                works.append(self.world.begin_share(total, kept[at : at + size]))
        self._sent[number] = works
        self._begun += works
        # The layer that the backward comes to after the next one takes this one's scratch memory; the next one, that of
        # the one above. Gaps between parameters have to be zero there.
        if 0 < number < len(self.spans) - 1:
            self.world.finish(self._sent.get(number + 1, []) if number + 1 < len(self.spans) - 1 else [])
            self.gradients.scratch(number - 1).zero_()
