# SPDX-License-Identifier: Apache-2.0
"""Weight gradients and column sums of many layers, and their Gram matrix, in a few launches after the backward.

A training step gives the sinks of its ops a `Tape`. An op that finds one in its sink notes what its parameter gradients are
computed from, and goes on with the gradients of its inputs. The step computes what was noted: it decides when, the functions
here how. They are Triton's; where another implementation runs, a step has no tape, and every op computes at once.

Addresses and sizes come from tables in device memory. A captured graph reads a table again at each replay, but must not copy
one from the host. `Tables` writes such tables when the capture is over.

Shapes: N token rows, T tasks, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minbert_fast.common.device import sent
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import custom_op

Rows = Sequence[Sequence[int]]


class Product(NamedTuple):
    """The weight and bias gradients of one linear layer: dweight[t] = dy[rows of t]^T x[rows of t], dbias[t] = sums."""

    dy: Tensor  # [N, O]
    x: Tensor  # [N, I]
    dweight: Tensor | None  # [T, O, I], any task stride; None: frozen
    dbias: Tensor | None  # [T, O]


class Unfinished(NamedTuple):
    """Partial column sums of one backward, and where the sums go."""

    partials: Tensor  # [programs + T - 1, quantities, width] fp32
    rows_per_program: int
    outputs: tuple[Tensor | None, ...]  # [T, width] of each quantity, any task stride; None: frozen


class Tape(Protocol):
    """Takes notes of gradients that a step computes later. Tensors that are noted must not change until then."""

    def product(self, product: Product) -> None:
        """Notes the parameter gradients of a linear layer."""

    def sums(self, sums: Unfinished) -> None:
        """Notes column sums."""


def groups(tensor: Tensor) -> bool:
    """Whether tensors like this one are computed by kernels that take many layers at once."""
    return implementation(tensor) == "triton"


class Tables:
    """Makes tables of numbers in device memory.

    A table of a graph must not lie in the graph's own memory. There, kernels that come earlier in the graph may use the
    same addresses, and every replay would overwrite it. So memory for the tables is set aside before the capture.
    """

    def __init__(self) -> None:
        self._numbers = self._most = 0  # in the tables of the present step, and of any step so far
        self._room: Tensor | None = None  # what is left of the memory set aside
        self._unwritten: list[tuple[Tensor, Rows]] = []

    def begin(self) -> None:
        """A step begins."""
        self._numbers = 0

    def on(self, device: torch.device, rows: Rows) -> Tensor:
        """int64 [rows, columns] on `device`. During a capture, its contents come with `write`.

        Raises RuntimeError if a captured step makes more tables than any step before it.
        """
        shape = len(rows), len(rows[0])
        size = shape[0] * shape[1]
        self._numbers += size
        self._most = max(self._most, self._numbers)
        if self._room is None:
            return sent(torch.tensor(rows, dtype=torch.int64), device)
        if self._room.numel() < size:
            raise RuntimeError(f"a captured step makes a table of {size} numbers; {self._room.numel()} were set aside")
        table, self._room = self._room[:size].view(shape), self._room[size:]
        self._unwritten.append((table, rows))
        return table

    def set_aside(self, device: torch.device) -> Tensor:
        """Memory for the tables of a capture that begins now. It must live as long as the graph."""
        self._room = torch.empty(self._most, dtype=torch.int64, device=device)
        return self._room

    def write(self) -> None:
        """Ends a capture and fills its tables."""
        for table, rows in self._unwritten:
            table.copy_(torch.tensor(rows, dtype=torch.int64))
        self._unwritten.clear()
        self._room = None


def partial_grams(tasks: int, device: torch.device) -> Tensor | None:
    """A buffer for the Gram matrix that is collected in parts; None for more tasks than the kernels take."""
    from minbert_fast.kernels import linear

    return linear.partial_grams(tasks, device)


def weight_gradients(
    products: Sequence[Product], bounds: Tensor, tables: Tables, partials: Tensor | None, add: bool
) -> None:
    """Computes all of `products` in one launch. Their inputs have one dtype, and their outputs have one.

    `partials`, from `partial_grams`, receives the Gram matrix of the weights' gradients in parts (`add`: added to what it
    holds). Sums are fp32, in a fixed order. An empty task gets zeros.
    """
    from minbert_fast.kernels import linear

    products = [
        product._replace(dy=product.dy.contiguous(), x=product.x.contiguous())
        for product in products
        if product.dweight is not None or product.dbias is not None
    ]
    if products:
        rows, tiles = linear.table([linear.Problem(*product) for product in products])
        where = tables.on(bounds.device, rows)
        columns = [list(column) for column in zip(*products, strict=True)]
        _weight_gradients(where, *columns, tiles, bounds, partials, add)


@custom_op("weight_gradients", mutates_args=("dweight", "dbias", "partials"))
def _weight_gradients(
    where: Tensor, dy: list[Tensor], x: list[Tensor], dweight: list[Tensor | None], dbias: list[Tensor | None],
    tiles: int, bounds: Tensor, partials: Tensor | None, add: bool,
) -> None:  # fmt: skip
    from minbert_fast.kernels import linear

    problems = [linear.Problem(*tensors) for tensors in zip(dy, x, dweight, dbias, strict=True)]
    linear.weight_gradients(problems, where, tiles, bounds, partials, add)


def column_sums(sums: Sequence[Unfinished], bounds: Tensor, tables: Tables) -> None:
    """Finishes all column sums in one launch. Their outputs have one dtype."""
    from minbert_fast.kernels import column_sums

    sums = [each for each in sums if any(out is not None for out in each.outputs)]
    if sums:
        rows, blocks = column_sums.many_table([column_sums.Unfinished(*each) for each in sums])
        where = tables.on(bounds.device, rows)
        outputs = [out for each in sums for out in each.outputs]
        sizes = [len(each.outputs) for each in sums]
        partials, programs = [each.partials for each in sums], [each.rows_per_program for each in sums]
        _column_sums(where, partials, programs, outputs, sizes, blocks, bounds)


@custom_op("column_sums_of_many", mutates_args=("outputs",))
def _column_sums(
    where: Tensor, partials: list[Tensor], rows_per_program: list[int], outputs: list[Tensor | None], sizes: list[int],
    blocks: int, bounds: Tensor,
) -> None:  # fmt: skip
    from minbert_fast.kernels import column_sums

    rest = iter(outputs)
    sums = [
        column_sums.Unfinished(each, rows, [next(rest) for _ in range(size)])
        for each, rows, size in zip(partials, rows_per_program, sizes, strict=True)
    ]
    column_sums.finish_many(sums, where, blocks, bounds)


def gram(pieces: Sequence[Tensor], tables: Tables, partials: Tensor, add: bool) -> Tensor:
    """G [T, T], fp32, from `pieces` [T, columns] of J (of one dtype, any task stride) and, with `add`, from `partials`.

    There is at least one piece; pieces may have no columns.
    """
    from minbert_fast.kernels import gram as kernels

    out = partials.new_empty(pieces[0].shape[0], pieces[0].shape[0])
    rows, blocks = kernels.pieces_table(pieces)
    _gram_of_pieces(tables.on(partials.device, rows), list(pieces), blocks, partials, add, out)
    return out


@custom_op("gram_of_pieces", mutates_args=("partials", "out"))
def _gram_of_pieces(where: Tensor, pieces: list[Tensor], blocks: int, partials: Tensor, add: bool, out: Tensor) -> None:
    from minbert_fast.kernels import gram as kernels

    kernels.gram_pieces(pieces, where, blocks, partials, add)
    kernels.finish(partials, out)
