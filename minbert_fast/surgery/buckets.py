# SPDX-License-Identifier: Apache-2.0
"""J of the optimizer wrapper: each task's gradients in a row, in buckets of parameters that the same tasks reach.

Parameters and tasks are numbers: positions in the wrapper's lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minbert_fast.common import huge_pages

# Elements of one task's gradients that are gathered at a time. Larger buckets are no faster; smaller ones save memory.
BUCKET = 1 << 24

Gradients = dict[int, Tensor]  # of one task, by the parameter's position
Reached = list[tuple[int, ...]]  # by the parameter's position: the tasks that reach it


class Bucket(NamedTuple):
    """Parameters of one device, dtype and set of tasks, by position, and the tasks' gradients [owners, n] of them."""

    group: list[int]
    owners: tuple[int, ...]
    J: Tensor


class Rows:
    """J in buckets, for parameters whose tasks are known before the backward. It is reused as long as they stay the same."""

    def __init__(self, parameters: list[nn.Parameter], reached: Reached, combined: list[int]) -> None:
        self._key = self._key_of(parameters, reached, combined)
        self.buckets: list[Bucket] = []
        self._pieces: dict[tuple[int, int], Tensor] = {}  # by task and position: a part of a row
        for group in _groups(parameters, reached, combined):
            owners, members = reached[group[0]], [parameters[i] for i in group]
            J = _empty_rows(len(owners), members)
            self.buckets.append(Bucket(group, owners, J))
            for row, owner in zip(J, owners, strict=True):
                for i, piece in zip(group, split(row, members), strict=True):
                    self._pieces[owner, i] = piece

    def fit(self, parameters: list[nn.Parameter], reached: Reached, combined: list[int]) -> bool:
        """Whether the buckets were made for just these."""
        return bool(self._key == self._key_of(parameters, reached, combined))

    @staticmethod
    def _key_of(parameters: list[nn.Parameter], reached: Reached, combined: list[int]) -> Any:
        return [(id(p), p.shape, p.stride(), p.dtype, p.device) for p in parameters], reached, combined

    def take(self, task: int, gradients: Gradients, earlier: Gradients) -> Gradients:
        """Moves a task's gradients into its rows, added to the `earlier` ones there. Those without a row stay apart."""
        own = {i: self._pieces[task, i] for i in gradients if (task, i) in self._pieces}
        for move, chosen in (
            (torch._foreach_copy_, [i for i in own if i not in earlier]),
            (torch._foreach_add_, [i for i in own if i in earlier]),
        ):
            if chosen:
                move([own[i] for i in chosen], [gradients[i] for i in chosen])
        apart = {i: g + earlier[i] if i in earlier else g for i, g in gradients.items() if i not in own}
        return earlier | own | apart


def _groups(parameters: list[nn.Parameter], reached: Reached, positions: list[int]) -> Iterator[list[int]]:
    """The positions of parameters that share a bucket: one device, dtype and set of tasks, up to BUCKET elements."""
    kinds: dict[Any, list[int]] = {}
    for i in positions:
        kinds.setdefault((parameters[i].device, parameters[i].dtype, reached[i]), []).append(i)
    for members in kinds.values():
        group: list[int] = []
        size = 0
        for i in members:
            count = _numbers(parameters[i])
            if group and size + count > BUCKET:
                yield group
                group, size = [], 0
            group.append(i)
            size += count
        yield group


def gathered(
    tasks: list[Gradients], parameters: list[nn.Parameter], reached: Reached, combined: list[int]
) -> list[Bucket]:
    """New buckets, into which the tasks' gradients of these parameters are moved."""
    found = []
    for group in _groups(parameters, reached, combined):
        owners, members = reached[group[0]], [parameters[i] for i in group]
        J = _empty_rows(len(owners), members)
        for row, owner in zip(J, owners, strict=True):
            for i, piece in zip(group, split(row, members), strict=True):
                piece.copy_(tasks[owner].pop(i))
        found.append(Bucket(group, owners, J))
    return found


def _empty_rows(rows: int, parameters: list[nn.Parameter]) -> Tensor:
    """J [rows, n] for the gradients of these parameters of one dtype: bf16 ones stay bf16, all others become fp32."""
    example = parameters[0]
    dtype = torch.bfloat16 if example.dtype == torch.bfloat16 else torch.float32
    return huge_pages.empty(rows, sum(map(_numbers, parameters)), dtype=dtype, device=example.device)


def _numbers(parameter: Tensor) -> int:
    """Real numbers in a row of J: a complex one counts as two, so that inner products are those of real vectors."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def split(row: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Views of a row [n], one for each parameter, with its shape and its order in memory (channels_last, transposed).

    Autograd lays a gradient out like its parameter too; fused optimizers read both by address.
    """
    pieces = []
    for p, piece in zip(parameters, row.split([_numbers(p) for p in parameters]), strict=True):
        numbers = torch.view_as_complex(piece.view(-1, 2)) if p.is_complex() else piece
        if p.is_contiguous():
            pieces.append(numbers.view(p.shape))
        else:
            strides = torch.empty_like(p, device="meta").stride()
            pieces.append(numbers.as_strided(p.shape, strides, numbers.storage_offset()))
    return pieces
