# SPDX-License-Identifier: Apache-2.0
"""What the ops share: checks of shapes, the tasks' row ranges, and an op's formula with gradients apart by task."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: Takes a task's number and one parameter's gradient from that task's rows.
Store = Callable[[int, Tensor], object]


def expect(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless `tensor` has this shape and dtype (None: any)."""
    if tensor.shape != torch.Size(shape) or dtype not in (None, tensor.dtype):
        wanted, got = "" if dtype is None else f"{dtype} ", "" if dtype is None else f"{tensor.dtype} "
        raise ValueError(f"{name} must be {wanted}{list(shape)}, not {got}{list(tensor.shape)}")


def segments(bounds: Tensor) -> list[tuple[int, int]]:
    """Row ranges of the tasks, on the host; asks the device for values."""
    return list(itertools.pairwise(bounds.tolist()))


def one_task(rows: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """A sink for all `rows` [N, ...] as one task: bounds [0, N], and an empty gradient [1, ...] a parameter.

    The bounds are made on the device, without a copy from the host.
    """
    bounds = torch.arange(2, dtype=torch.int32, device=rows.device) * rows.shape[0]
    return bounds, *(parameter.new_empty(1, *parameter.shape) for parameter in parameters)


def anchor(device: torch.device) -> Tensor:
    """An empty tensor that requires grad: an op that takes it runs its backward even if no other input requires grad."""
    return torch.empty(0, device=device, requires_grad=True)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that formulas are computed in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def into(view: Tensor | None) -> Store | None:
    """Writes each task's gradient to view[task]; None for a frozen parameter."""
    return None if view is None else lambda task, gradient: view[task].copy_(gradient)


def by_task(
    formula: Callable[..., Tensor],
    rows: Sequence[Tensor],
    parameters: Sequence[Tensor],
    bounds: Tensor,
    stores: Sequence[Store | None],
) -> Tensor:
    """formula(*rows, *parameters) [N, ...] in plain PyTorch, one task after another.

    The backward hands each parameter's gradient to its store, task by task; the parameters themselves are constants.
    Rows from bounds[T] on get no gradient and give none.
    """
    outputs, end = [], 0
    for task, (begin, end) in enumerate(segments(bounds)):
        leaves = [parameter.detach() for parameter in parameters]
        for leaf, store in zip(leaves, stores, strict=True):
            if store is not None:
                leaf.requires_grad_().register_hook(_storing(store, task))
        outputs.append(formula(*(t[begin:end] for t in rows), *leaves))
    outputs.append(formula(*(t[end:].detach() for t in rows), *(t.detach() for t in parameters)))
    y = torch.cat(outputs)
    return y if y.requires_grad else y.requires_grad_()


def _storing(store: Store, task: int) -> Callable[[Tensor], Any]:
    def hook(gradient: Tensor) -> None:
        store(task, gradient)

    return hook
