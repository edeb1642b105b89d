# SPDX-License-Identifier: Apache-2.0
"""Sums the gradients of one step over the processes that share it.

After a backward each process has the gradients of its share of the batch. The sum of a layer starts as soon as the backward
has written that layer, and runs while the backward works on the layer below: the last layer first, then the rest of the
shared region, then words, heads and losses. Every process starts the same sums in the same order.

Here every process gets all of J and updates all parameters; in `sharding.py` each process gets a part of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from minbert_fast.parallel.world import World
from minbert_fast.recipes.sections import OptimizerOptions
from minbert_fast.step.flat import FlatParameters, ParameterGroup, TaskGradients
from minbert_fast.step.hooks import Exchange
from minbert_fast.step.optim import FlatAdamW

if TYPE_CHECKING:
    from torch.distributed import Work

RANK_STRIDE = 7_368_787  # between the dropout seeds of ranks


@dataclass(frozen=True)
class Span:
    """Elements [begin, end) of the shared region or of the words, all of one group."""

    group: ParameterGroup
    begin: int
    end: int


def spans(flat: FlatParameters, layers: Sequence[Sequence[nn.Parameter]]) -> list[list[Span]]:
    """Divides the shared region into the spans of each layer's parameters and, last, the spans of all other parameters."""
    layer_of: dict[int, int] = {}  # by a parameter's first element
    for number, layer in enumerate(layers):
        layer_of |= {flat.placement(p).begin: number for p in layer if p in flat}
    cut: list[list[Span]] = [[] for _ in range(len(layers) + 1)]
    for group in flat.groups:
        if group.label == "shared":
            begins = [place.begin for place in flat.placements() if group.begin <= place.begin < group.end]
            numbers = [layer_of.get(begin, len(layers)) for begin in begins]
            first = [i for i, number in enumerate(numbers) if i == 0 or numbers[i - 1] != number]
            for i, end in zip(first, [*(begins[j] for j in first[1:]), group.end], strict=True):
                cut[numbers[i]].append(Span(group, begins[i], end))
    return cut


class AllReduce(Exchange):
    """Gives every process the sums of all of J (all-reduce)."""

    part = "exchange"

    def __init__(self, world: World, gradients: TaskGradients, spans: Sequence[Sequence[Span]]) -> None:
        self.world = world
        self.flat = gradients.flat
        self.seed_offset = world.rank * RANK_STRIDE
        self.spans = spans  # of each layer, whose gradients are complete when `after_layer` is called, then of the rest
        self.gradients = gradients
        self._unsent: list[int] = []  # indices into `spans`, in the order of their sums
        self._begun: list[Work | None] = []

    def optimizer(self, options: OptimizerOptions) -> FlatAdamW:
        return FlatAdamW(self.flat, options)

    def before_weights(self, losses: Tensor, present: Sequence[str]) -> None:
        self.world.reduce(losses)

    def remeasured(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        self.world.reduce(losses)

    def before_backward(self) -> None:
        self._begun = []
        last = len(self.spans) - 1
        self._unsent = [*reversed(range(last)), last]

    def after_layer(self, layer: int) -> None:
        """Starts the sums of `layer` and of the layers above it. Does nothing unless `before_backward` was called."""
        while self._unsent and layer <= self._unsent[0] < len(self.spans) - 1:
            self._send(self._unsent.pop(0))

    def after_backward(self, tensors: Sequence[Tensor]) -> None:
        """Starts the remaining sums, and returns when J and `tensors` are summed."""
        while self._unsent:
            self._send(self._unsent.pop(0))
        self._begun += [self.world.begin_sum([tensor]) for tensor in tensors]
        self.world.finish(self._begun)

    def _send(self, number: int) -> None:
        """Starts the sums of all rows of a layer, in one message."""
        spans, J = self.spans[number], self.gradients.J
        self._begun.append(self.world.begin_sum([row[span.begin : span.end] for span in spans for row in J]))
