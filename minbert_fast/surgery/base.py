# SPDX-License-Identifier: Apache-2.0
"""The interface of a method, and the two ways to run one: on the device, or solved on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Reduction = Literal["sum", "mean"]


class Weights:
    """A surgery method as the training step uses it. As it is here, it has no state and draws no random numbers."""

    #: Whether a CUDA graph may capture a call: the call runs on the device and never waits for it.
    capturable = False

    def __init__(self, reduction: Reduction = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction = {reduction!r}: expected "sum" or "mean"')
        self.reduction = reduction

    def draw(self, tasks: int) -> Tensor | None:
        """Draws one step's random orders, int32 [T, T] on the host. None: the method has none."""
        return None

    def __call__(self, gram: Tensor, orders: Tensor | None = None) -> Tensor:
        """w [T] from G [T, T], on G's device. `orders` are those of `draw`, on G's device; None: the call draws them."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class OnHost(Weights):
    """A method solved on the host in fp64.

    `solve` maps the G of the finite tasks that have a gradient, scaled to a largest square of 1, to the weights of their
    average. ValueError if it gives another number of weights. A task without a gradient, such as one without examples in
    the batch, gets weight 0 and does not change the sum of the others.
    """

    def __init__(self, solve: Callable[[Array], Array], reduction: Reduction = "sum") -> None:
        super().__init__(reduction)
        self.solve = solve

    def __call__(self, gram: Tensor, orders: Tensor | None = None) -> Tensor:
        tasks = gram.shape[0]
        full = gram.detach().double().cpu().numpy()
        used = np.isfinite(full.diagonal()) & (full.diagonal() > 0)
        w = torch.zeros(tasks, dtype=torch.float64)
        if used.any():
            full = full[used][:, used]
            solution = np.asarray(self.solve(full / full.diagonal().max()), dtype=np.float64)
            check_shape(self.solve, solution.shape, len(full))
            factor = len(full) if self.reduction == "sum" else len(full) / tasks
            w[torch.from_numpy(used)] = torch.from_numpy(solution) * factor
        return w.to(gram)


def check_shape(method: object, shape: Sequence[int], tasks: int) -> None:
    """Raises ValueError if a method of the user's own gave weights of another shape than [T]."""
    if tuple(shape) != (tasks,):
        name = getattr(method, "__name__", type(method).__name__)
        raise ValueError(f"surgery method {name} gave weights of shape {list(shape)}, expected [{tasks}], one per task")


def nonfinite(gram: Tensor) -> Tensor:
    """bool [T], on the device: whether a task's gradient holds NaN or infinity, or its squared norm overflows fp32."""
    return ~gram.diagonal().isfinite()
