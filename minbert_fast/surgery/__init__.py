# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery: from the Gram matrix of the tasks' gradients to one weight a task.

Every method here looks at G [T, T] = J J^T only and answers with w [T]; the gradient that the optimizer sees is w J.

    method        what it does                                                      where it runs
    none          adds the gradients                                                device
    pcgrad        takes conflicting parts out of each, Yu et al. 2020               device
    upgrad        projects each onto the dual cone, Quinton & Rey 2024              host
    mgda          the shortest convex combination, Désidéri 2012                    host
    cagrad        the best worst-case near the mean, Liu et al. 2021                host
    aligned_mtl   balances the principal components, Senushkin et al. 2023          host

Those on the host copy G there (T x T numbers) and wait for it, so they cannot be part of a captured CUDA graph.
Each averages the tasks as published with reduction "mean"; "sum" is T times that. A task whose gradient is not finite
(or whose squared norm overflows fp32) gets weight 0 and has no say in the others' weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.surgery import solvers

Reduction = Literal["sum", "mean"]


class Weights(Protocol):
    """What a surgery method offers the training step."""

    capturable: bool
    """Whether a call may be captured in a CUDA graph: it runs on the device and never waits."""

    def prepare(self, tasks: int, device: torch.device) -> None:
        """Host work of one step (random orders). Called before every step, outside a captured graph."""

    def __call__(self, gram: Tensor) -> Tensor:
        """w [T] from G [T, T], on G's device."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def nonfinite(gram: Tensor) -> Tensor:
    """bool [T], on the device: whose gradient holds NaN or infinity (or is too long for its square to fit fp32)."""
    return ~gram.diagonal().isfinite()


def cosines(gram: Tensor) -> Tensor:
    """[T, T] cosines between the tasks' gradients, on the device; 0 beside a gradient of zero."""
    lengths = gram.diagonal().sqrt()
    products = lengths * lengths[:, None]
    return torch.where(products > 0, gram / products, 0).clamp(-1, 1)


def conflicts(gram: Tensor) -> Tensor:
    """The share [] of pairs of tasks whose gradients point against each other, on the device."""
    tasks = gram.shape[0]
    opposed = torch.triu(gram < 0, diagonal=1).sum()
    return opposed / max(tasks * (tasks - 1) / 2, 1)


def task_orders(tasks: int, generator: torch.Generator) -> Tensor:
    """int32 [T, T] on the host: for each task, a random order of all tasks (a task passes over itself)."""
    return torch.stack([torch.randperm(tasks, generator=generator) for _ in range(tasks)]).int()


class _Stateless:
    """A method that draws nothing."""

    capturable = False

    def __init__(self, reduction: Reduction = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction = {reduction!r}: expected "sum" or "mean"')
        self.reduction = reduction

    def prepare(self, tasks: int, device: torch.device) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Equal(_Stateless):
    """No surgery: the sum or mean of the tasks' gradients."""

    capturable = True

    def __call__(self, gram: Tensor) -> Tensor:
        weight = 1.0 if self.reduction == "sum" else 1.0 / gram.shape[0]
        return torch.where(nonfinite(gram), 0.0, weight).to(gram.dtype)


class Projections(_Stateless):
    """PCGrad: each task's gradient loses its components along those it conflicts with, in random order.

    Yu et al. 2020, arXiv:2001.06782, algorithm 1. `prepare` draws the orders from `generator` (by default one seeded
    with torch.initial_seed()), whose state is what `state_dict` saves. A call without `prepare` draws for itself.
    """

    capturable = True

    def __init__(self, reduction: Reduction = "sum", generator: torch.Generator | None = None) -> None:
        super().__init__(reduction)
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self._orders: Tensor | None = None
        self._fresh = False

    def prepare(self, tasks: int, device: torch.device) -> None:
        orders = task_orders(tasks, self.generator)
        if device.type == "cuda":
            orders = orders.pin_memory()
        if self._orders is None or self._orders.shape[0] != tasks or self._orders.device != device:
            self._orders = torch.empty(tasks, tasks, dtype=torch.int32, device=device)
        self._orders.copy_(orders, non_blocking=True)  # in place: a captured graph reads this tensor
        self._fresh = True

    def __call__(self, gram: Tensor) -> Tensor:
        if not self._fresh:
            self.prepare(gram.shape[0], gram.device)
        assert self._orders is not None
        self._fresh = False
        w, _ = ops.pcgrad_weights(gram, self._orders, self.reduction == "mean")
        return w

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self._fresh = False


class OnHost(_Stateless):
    """A method solved on the host in fp64: `solve` maps a finite G [T, T], scaled to a largest square of 1, to w."""

    def __init__(self, solve: Callable[[solvers.Array], solvers.Array], reduction: Reduction = "sum") -> None:
        super().__init__(reduction)
        self.solve = solve

    def __call__(self, gram: Tensor) -> Tensor:
        tasks = gram.shape[0]
        full = gram.detach().double().cpu().numpy()
        used = full.diagonal() - full.diagonal() == 0
        w = torch.zeros(tasks, dtype=torch.float64)
        if used.any():
            finite = full[used][:, used]
            largest = finite.diagonal().max()
            solution = self.solve(finite / largest if largest > 0 else finite)
            w[torch.from_numpy(used)] = torch.from_numpy(solution) * (tasks if self.reduction == "sum" else 1)
        return w.to(gram)


class FromTorchJD(_Stateless):
    """A TorchJD `Weighting` of Gram matrices in our slot; it runs wherever it does, and may wait for the device."""

    def __init__(self, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weighting = weighting

    def __call__(self, gram: Tensor) -> Tensor:
        used = ~nonfinite(gram)
        w = torch.zeros_like(gram[0])
        if used.any():
            w[used] = self.weighting(gram[used][:, used]).to(w)
        return w


METHODS: dict[str, Callable[[Reduction, torch.Generator | None], Weights]] = {
    "none": lambda reduction, generator: Equal(reduction),
    "pcgrad": lambda reduction, generator: Projections(reduction, generator),
    "upgrad": lambda reduction, generator: OnHost(solvers.upgrad, reduction),
    "mgda": lambda reduction, generator: OnHost(solvers.mgda, reduction),
    "cagrad": lambda reduction, generator: OnHost(solvers.cagrad, reduction),
    "aligned_mtl": lambda reduction, generator: OnHost(solvers.aligned_mtl, reduction),
}


def weights(
    method: str | Callable[[Tensor], Tensor] = "pcgrad",
    reduction: Reduction = "sum",
    generator: torch.Generator | None = None,
) -> Weights:
    """The method of that name, or anything that maps G to w: an object of this module, or a TorchJD `Weighting`.

    `reduction` and `generator` go to named methods only. ValueError for a name that is not in METHODS.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"surgery method {method!r}: expected one of {', '.join(METHODS)}")
        return METHODS[method](reduction, generator)
    if hasattr(method, "prepare"):
        return method  # type: ignore[return-value]
    if not callable(method):
        raise ValueError(f"surgery method: expected a name or a callable, not {type(method).__name__}")
    return FromTorchJD(method)
