# SPDX-License-Identifier: Apache-2.0
"""Parameter gradients of a backward, noted as it goes and computed by a few launches for many layers.

On a GPU a launch for each layer leaves most multiprocessors idle at its end, and a small step waits for launches. So the
ops' backward notes what a weight's gradient is computed from, and the step computes many of them at once, with their part
of the Gram matrix. On a CPU, whose caches want a gradient computed where its inputs are, a step has no tape.

Shapes: T tasks, P parameters that tasks share, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minbert_fast.ops import grouped
from minbert_fast.ops.grouped import Product, Tables, Unfinished
from minbert_fast.step.flat import TaskGradients

#: Bytes of output gradients that a tape keeps before it computes. BERT-base's twelve layers keep 39 MB each at 2,816 rows
#: in bf16; their inputs were kept for the backward anyway, but stay as long.
KEPT_BYTES = 256 << 20


class Tape:
    """The notes of one backward: weight gradients in launches of about `KEPT_BYTES`, column sums in one at the end."""

    def __init__(self, gradients: TaskGradients, bounds: Tensor, tables: Tables, gram: bool) -> None:
        self.gradients = gradients
        self.bounds = bounds  # [T + 1] token rows of J's rows
        self._tables = tables
        tasks, device = bounds.numel() - 1, gradients.J.device
        self._partials = grouped.partial_grams(tasks, device) if gram else None
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._products: list[Product] = []
        self._sums: list[Unfinished] = []
        self._kept = 0
        self._computed: list[Tensor] = []  # weights' views of J whose inner products are in the partial Gram matrix

    def product(self, product: Product) -> None:
        """Notes a layer's gradients, and computes all that are noted if they keep too much memory."""
        self._products.append(product)
        self._kept += product.dy.numel() * product.dy.element_size()
        if self._kept >= KEPT_BYTES:
            self._compute()

    def sums(self, sums: Unfinished) -> None:
        """Notes column sums."""
        self._sums.append(sums)

    def finish(self) -> None:
        """Computes everything that is noted: J then holds the gradients of all layers above."""
        self._compute()
        grouped.column_sums(self._sums, self.bounds, self._tables)
        self._sums.clear()

    def _compute(self) -> None:
        grouped.weight_gradients(self._products, self.bounds, self._tables, self._partials, add=bool(self._computed))
        if self._partials is not None:
            self._computed += [product.dweight for product in self._products if product.dweight is not None]
        self._products.clear()
        self._kept = 0

    def gram(self, words: Tensor | None) -> Tensor:
        """G [T, T] of J and of the words' rows [T, U, H]. Reads only what the launches of the weights did not multiply."""
        if self._partials is None:
            return self.gradients.gram(words)
        J = self.gradients.J
        pieces = _between(J, self._computed) or [J[:, :0]]  # of a frozen encoder J is empty
        if words is not None:
            pieces.append(words.flatten(1))
        return grouped.gram(pieces, self._tables, self._partials, add=bool(self._computed))


def _between(J: Tensor, views: Sequence[Tensor]) -> list[Tensor]:
    """The parts [T, columns] of J [T, P] that none of the `views` [T, ...] covers."""
    taken = []
    for view in views:
        first = int(view.storage_offset() - J.storage_offset())
        taken.append((first, first + view[0].numel()))
    pieces, end = [], 0
    for first, last in [*sorted(taken), (J.shape[1], J.shape[1])]:
        if first > end:
            pieces.append(J[:, end:first])
        end = last
    return pieces
