# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery: from the Gram matrix of the tasks' gradients to one weight a task.

    method = surgery.weights("pcgrad")
    w = method(J @ J.T)  # w [T] from G [T, T]; the optimizer's gradient is w J

Each method is one file of its name, with the formula, an example, and `weights(G) -> w` or a class. The other files:

    base.py       what the methods share
    solvers.py    small optimization problems that several methods share
    torchjd.py    TorchJD's weightings as methods of ours
    wrapper.py    `PCGrad(optimizer)`, the optimizer wrapper for course code
    buckets.py    the gradients of that wrapper, one row a task

A method averages the tasks as published with reduction "mean"; "sum" is T times that. A task whose gradient is zero does
not influence the others' part in the sum. Nor does one whose gradient is not finite (or whose squared norm overflows fp32);
it gets weight 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minbert_fast.surgery import aligned_mtl, cagrad, imtl_g, mgda, nash_mtl, upgrad
from minbert_fast.surgery.base import OnHost, Reduction, Weights, nonfinite
from minbert_fast.surgery.gradvac import GradVac
from minbert_fast.surgery.none import Equal
from minbert_fast.surgery.pcgrad import Projections, task_orders
from minbert_fast.surgery.torchjd import FromTorchJD, named

__all__ = ["METHODS", "Reduction", "Weights", "nonfinite", "task_orders", "weights"]

#: Makes the method of a name. One that you add may also make a plain function from G to w.
METHODS: dict[str, Callable[[Reduction, torch.Generator | None], Weights | Callable[[Tensor], Tensor]]] = {
    "none": lambda reduction, generator: Equal(reduction),
    "pcgrad": Projections,
    "upgrad": lambda reduction, generator: OnHost(upgrad.weights, reduction),
    "mgda": lambda reduction, generator: OnHost(mgda.weights, reduction),
    "cagrad": lambda reduction, generator: OnHost(cagrad.weights, reduction),
    "aligned_mtl": lambda reduction, generator: OnHost(aligned_mtl.weights, reduction),
    "gradvac": GradVac,
    "imtl_g": lambda reduction, generator: OnHost(imtl_g.weights, reduction),
    "nash_mtl": lambda reduction, generator: OnHost(nash_mtl.weights, reduction),
}


def weights(
    method: str | Callable[[Tensor], Tensor] = "pcgrad",
    reduction: Reduction = "sum",
    generator: torch.Generator | None = None,
) -> Weights:
    """The method of that name, or anything that maps G to w: an object of this module, or a TorchJD `Weighting`.

    "torchjd:NAME" or "torchjd:NAME(option=value, ...)" is TorchJD's weighting. Such a weighting, like any other callable,
    gives the weights themselves: it takes no reduction "mean". ValueError of one line for that, and for an unknown name.
    """
    if reduction == "mean" and (method.startswith("torchjd:") if isinstance(method, str) else callable(method)):
        shown = method if isinstance(method, str) else type(method).__name__
        raise ValueError(
            f'surgery method {shown!r} gives the weights themselves: reduction = "mean" has no effect on it'
        )
    if isinstance(method, str):
        if method.startswith("torchjd:"):
            return named(method.removeprefix("torchjd:"), generator)
        if method not in METHODS:
            raise ValueError(f"surgery method {method!r}: expected one of {', '.join(METHODS)}, torchjd:NAME")
        made = METHODS[method](reduction, generator)
        return made if isinstance(made, Weights) else weights(made, reduction, generator)
    if isinstance(method, Weights):
        return method
    if not callable(method):
        raise ValueError(f"surgery method: expected a name or a callable, not {type(method).__name__}")
    return FromTorchJD(method, generator)
