# SPDX-License-Identifier: Apache-2.0
"""Helpers of the ops' tests: gradients as slices of J, and each task's expected gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.tolerance import assert_within_budget, reference

DTYPES = (torch.float32, torch.bfloat16)
#: 1 / (1 - P) = 1.25 is exact in every dtype.
P, EPS = 0.2, 1e-12
ROWS = 40  # of the bounds in tests.tolerance.AWKWARD_BOUNDS


class Slices:
    """Gradient outputs as slices of one buffer [T, P], all NaN, with a gap after each that no kernel may touch."""

    def __init__(
        self, tasks: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        gap = 5
        self.buffer = torch.full(
            (tasks, sum(math.prod(s) + gap for s in shapes.values())), math.nan, dtype=dtype, device=device
        )
        self.views: dict[str, Tensor] = {}
        begin = 0
        for name, shape in shapes.items():
            self.views[name] = self.buffer[:, begin : begin + math.prod(shape)].unflatten(1, shape)
            begin += math.prod(shape) + gap

    def assert_gaps_untouched(self) -> None:
        left = self.buffer.clone()
        for view in self.views.values():
            offset = view.storage_offset() - self.buffer.storage_offset()
            left[:, offset : offset + view[0].numel()] = math.nan
        assert left.isnan().all(), "a kernel wrote between its outputs"


def int32(*values: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def random(*shape: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Standard normal values that `dtype` can hold."""
    return torch.randn(shape, generator=generator).to(device, dtype)


def check_by_task(
    formula: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    cotangent: Tensor,
    bounds: Sequence[int],
    rowwise: dict[str, Tensor],
    by_task: dict[str, Tensor],
    **constants: Any,
) -> None:
    """Holds per-row gradients, and each task's gradient, to the error budget.

    A task's gradient is that of the formula with the cotangent zeroed outside the task's rows. `rowwise[input]` are the
    gradients of per-row inputs (they must vanish from bounds[-1] on); `by_task[input]` [T, ...] of parameters.
    """
    own = torch.zeros_like(cotangent)
    own[: bounds[-1]] = cotangent[: bounds[-1]]
    whole = reference(formula, inputs, [own], **constants)
    exact, plain = (dict(zip(whole.names, each, strict=True)) for each in (whole.exact, whole.plain))
    for name, actual in rowwise.items():
        assert_within_budget(actual, exact[f"d{name}"], plain[f"d{name}"], name=f"d{name}")
        assert not actual[bounds[-1] :].any(), f"d{name} reaches into the padding"
    for task, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = torch.zeros_like(cotangent)
        own[begin:end] = cotangent[begin:end]
        expected = reference(formula, inputs, [own], **constants)
        exact, plain = (dict(zip(expected.names, each, strict=True)) for each in (expected.exact, expected.plain))
        for name, actual in by_task.items():
            assert_within_budget(
                actual[task],
                exact[f"d{name}"],
                plain[f"d{name}"].to(actual.dtype),
                rows=max(end - begin, 1),
                name=f"d{name} of task {task}",
            )
            if begin == end:
                assert not actual[task].any(), f"d{name} of an empty task is not zero"
