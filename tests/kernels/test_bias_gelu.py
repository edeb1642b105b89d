# SPDX-License-Identifier: Apache-2.0
"""bias_gelu kernels: output and every gradient against fp64, by task."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert_fast.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from minbert_fast.ops import reference as plain
from tests.kernels.task_gradients import DTYPES, ROWS, Slices, check_by_task, random
from tests.tolerance import AWKWARD_BOUNDS, reference


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name, spread so that both tails of the GELU are reached, and a cotangent."""
    generator = torch.Generator().manual_seed(width)
    x = 3 * random(rows, width, dtype=dtype, device=device, generator=generator)
    bias = random(width, dtype=dtype, device=device, generator=generator)
    return {"x": x, "bias": bias}, random(rows, width, dtype=dtype, device=device, generator=generator)


def check(rows: int, width: int, bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, dy = inputs(rows, width, dtype, device)
    reference(plain.bias_gelu, tensors).check([bias_gelu_forward(**tensors)])
    slices = Slices(len(bounds) - 1, {"bias": (width,)}, torch.float32, device)
    on_device = torch.tensor(bounds, dtype=torch.int32, device=device)
    dx = bias_gelu_backward(dy, **tensors, bounds=on_device, dbias=slices.views["bias"])
    check_by_task(plain.bias_gelu, tensors, dy, bounds, {"x": dx}, slices.views)
    slices.assert_gaps_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 768])
def test_within_the_error_budget(width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(ROWS, width, AWKWARD_BOUNDS["three tasks"], dtype, device)


@pytest.mark.parametrize("bounds", AWKWARD_BOUNDS.values(), ids=AWKWARD_BOUNDS)
def test_awkward_bounds(bounds: tuple[int, ...], device: torch.device) -> None:
    check(ROWS, 68, bounds, torch.float32, device)


@pytest.mark.parametrize(
    ("rows", "bounds"),
    [(1, (0, 1)), (150, (0, 63, 64, 65, 129, 140))],
    ids=["one row", "bounds beside the programs' own"],
)
def test_awkward_rows(rows: int, bounds: tuple[int, ...], device: torch.device) -> None:
    check(rows, 36, bounds, torch.float32, device)


def test_far_tails_are_exact(device: torch.device) -> None:
    """GELU is 0 far to the left and the identity far to the right, derivative included; no NaN from 0 * infinity."""
    x = torch.tensor([[-1e4, -40.0, 40.0, 1e4]], device=device)
    bias = torch.zeros(4, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    assert bias_gelu_forward(x, bias).tolist() == [[0.0, 0.0, 40.0, 1e4]]
    assert bias_gelu_backward(torch.ones_like(x), x, bias, bounds, None).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_deterministic(device: torch.device) -> None:
    tensors, dy = inputs(ROWS, 100, torch.float32, device)
    bounds = torch.tensor([0, 11, 40], dtype=torch.int32, device=device)
    first, second = torch.empty(2, 2, 100, device=device)
    assert torch.equal(
        bias_gelu_backward(dy, **tensors, bounds=bounds, dbias=first),
        bias_gelu_backward(dy, **tensors, bounds=bounds, dbias=second),
    )
    assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1536, 3072])
def test_real_sizes(width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(2770, width, (0, 900, 1500, 2700), dtype, device)
