# SPDX-License-Identifier: Apache-2.0
"""Helpers of the ops: checks of shapes, the tasks' row ranges, and each task's gradients of a formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Takes a task's number and one parameter's gradient from that task's rows.
Store = Callable[[int, Tensor], object]


def expect(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless `tensor` has this shape and dtype (None: any)."""
    if tensor.shape != torch.Size(shape) or dtype not in (None, tensor.dtype):
        wanted, got = "" if dtype is None else f"{dtype} ", "" if dtype is None else f"{tensor.dtype} "
        raise ValueError(f"{name} must be {wanted}{list(shape)}, not {got}{list(tensor.shape)}")


def row_ranges(bounds: Tensor) -> list[tuple[int, int]]:
    """Row ranges of the tasks, on the host. Waits for the device."""
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


def store_in(view: Tensor | None) -> Store | None:
    """A store that writes each task's gradient to view[task]; None for a frozen parameter."""
    return None if view is None else lambda task, gradient: view[task].copy_(gradient)


def by_task(
    formula: Callable[..., Tensor],
    rows: Sequence[Tensor],
    parameters: Sequence[Tensor],
    bounds: Tensor,
    stores: Sequence[Store | None],
) -> Tensor:
    """formula(*rows, *parameters) [N, ...] in plain PyTorch, which computes each row from the same row of `rows` [N, ...].

    The parameters are constants for autograd: the backward passes each task's gradients of them to their stores. Rows from
    bounds[T] on get no gradient and add to none.
    """
    return _ByTask.apply(formula, len(rows), stores, bounds, anchor(bounds.device), *rows, *parameters)


class _ByTask(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, formula: Callable[..., Tensor], rowwise: int, stores: Sequence[Store | None], bounds: Tensor,
        anchor: Tensor, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.formula, ctx.rowwise, ctx.stores = formula, rowwise, stores
        ctx.save_for_backward(bounds, *tensors)
        return formula(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        bounds, *tensors = ctx.saved_tensors
        gradients = [torch.zeros_like(t) for t in tensors[: ctx.rowwise]]
        for task, (begin, end) in enumerate(row_ranges(bounds)):
            leaves = [(t[begin:end] if i < ctx.rowwise else t).detach() for i, t in enumerate(tensors)]
            floating = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
            with torch.enable_grad():
                wanted = [leaves[i].requires_grad_() for i in floating]
                own = torch.autograd.grad(ctx.formula(*leaves), wanted, dy[begin:end])
            for i, gradient in zip(floating, own, strict=True):
                if i < ctx.rowwise:
                    gradients[i][begin:end] = gradient
                elif (store := ctx.stores[i - ctx.rowwise]) is not None:
                    store(task, gradient)
        rows = [gradient if gradient.is_floating_point() else None for gradient in gradients]
        return *(None,) * 5, *rows, *(None,) * (len(tensors) - ctx.rowwise)
