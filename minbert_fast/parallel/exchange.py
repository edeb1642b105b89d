# SPDX-License-Identifier: Apache-2.0
"""What processes that train together tell each other of a step: the gradients, and, where they share the work, parameters.

A backward leaves each process with the gradients of its own share of the batch. They are summed a layer at a time, as soon
as the backward is through with it, while it goes on with the layer below: last layer first, then the rest of the shared
region, then words, heads and losses. Every process begins the same sums in the same order, whatever its share is.

Here J is whole in every process afterwards, and every process takes the whole optimizer step; `sharding.py` leaves each
process a part of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.parallel.world import World
from minbert_fast.step.flat import FlatParameters, Piece, Run, TaskGradients

if TYPE_CHECKING:
    from torch.distributed import Work


@dataclass(frozen=True)
class Span:
    """Elements [begin, end) of the shared region, all of one run."""

    run: Run
    begin: int
    end: int


def spans(flat: FlatParameters, layers: Sequence[Sequence[nn.Parameter]]) -> list[list[Span]]:
    """The shared region cut up: the spans of each layer's parameters, and, last, those of everything else."""
    layer_of: dict[int, int] = {}  # by where a slot begins
    for number, layer in enumerate(layers):
        layer_of |= {flat.slot(p).begin: number for p in layer if p in flat}
    cut: list[list[Span]] = [[] for _ in range(len(layers) + 1)]
    for run in flat.runs:
        if run.label == "shared":
            begins = [slot.begin for slot in flat.slots() if run.begin <= slot.begin < run.end]
            numbers = [layer_of.get(begin, len(layers)) for begin in begins]
            first = [i for i, number in enumerate(numbers) if i == 0 or numbers[i - 1] != number]
            for i, end in zip(first, [*(begins[j] for j in first[1:]), run.end], strict=True):
                cut[numbers[i]].append(Span(run, begins[i], end))
    return cut


class Exchange:
    """J whole in every process. With a world of one, nothing is exchanged."""

    def __init__(
        self,
        world: World,
        flat: FlatParameters,
        tasks: int,
        dtype: torch.dtype,
        layers: Sequence[Sequence[nn.Parameter]],  # those whose gradients are there when the backward leaves the layer
    ) -> None:
        self.world = world
        self.flat = flat
        self.spans = spans(flat, layers)
        self.gradients = self._room(tasks, dtype)
        self.pieces = self._pieces()
        self._order: Iterator[int] = iter(())  # numbers of the spans still to be sent
        self._next: int | None = None
        self._begun: list[Work | None] = []

    def _room(self, tasks: int, dtype: torch.dtype) -> TaskGradients:
        return TaskGradients(self.flat, tasks, dtype)

    def _pieces(self) -> tuple[Piece, ...]:
        """The elements that this process's optimizer moves."""
        return self.flat.pieces()

    def open(self) -> None:
        """A backward that fills J is about to begin."""
        if self.world.size > 1:
            self._begun = []
            self._order = itertools.chain(reversed(range(len(self.spans) - 1)), [len(self.spans) - 1])
            self._next = next(self._order)

    def ready(self, layer: int) -> None:
        """The backward is through with `layer` and those above. Without an `open` before it, this means nothing."""
        while self._next is not None and layer <= self._next < len(self.spans) - 1:
            self._send(self._next)
            self._next = next(self._order)

    def close(self, *others: Tensor) -> None:
        """Returns when J and `others` are summed."""
        if self.world.size == 1:
            return
        while self._next is not None:
            self._send(self._next)
            self._next = next(self._order, None)
        self._begun += [self.world.begin_sum(tensor) for tensor in others]
        self.world.finish(self._begun)

    def gram(self, words: Tensor | None) -> Tensor:
        """G [T, T]: inner products of the tasks' gradients over the shared region and the words' rows [T, U, H]."""
        gram = ops.gram(self.gradients.J)
        return gram if words is None else ops.gram(words.flatten(1), gram, accumulate=True)

    def spread(self) -> None:
        """Tells the others the parameters that only this process has moved."""

    def whole(self, kept: Tensor) -> Tensor:
        """What all processes keep of the moments [trainable], for a checkpoint. All of them have to ask."""
        return kept

    def _send(self, number: int) -> None:
        for span in self.spans[number]:
            self._begun += [self.world.begin_sum(row[span.begin : span.end]) for row in self.gradients.J]
