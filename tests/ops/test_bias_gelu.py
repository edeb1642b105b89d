# SPDX-License-Identifier: Apache-2.0
"""bias_gelu on every floor: output and every gradient against fp64, by task."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops.bias_gelu import bias_gelu_forward, reference
from tests import tolerance
from tests.ops.common import DTYPES, ROWS, Slices, check_by_task, int32, random
from tests.tolerance import AWKWARD_BOUNDS


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs by name, spread so that both tails of the GELU are reached, and a cotangent."""
    generator = torch.Generator().manual_seed(width)
    x = 3 * random(rows, width, dtype=dtype, device=device, generator=generator)
    bias = random(width, dtype=dtype, device=device, generator=generator)
    return {"x": x, "bias": bias}, random(rows, width, dtype=dtype, device=device, generator=generator)


def run(x: Tensor, bias: Tensor, dy: Tensor, bounds: tuple[int, ...], dbias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y, dx."""
    x = x.clone().requires_grad_()
    y = ops.bias_gelu(x, bias, ops.BiasGeluSink(int32(*bounds, device=x.device), dbias))
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def check(rows: int, width: int, bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, dy = inputs(rows, width, dtype, device)
    slices = Slices(len(bounds) - 1, {"bias": (width,)}, torch.float32, device)
    y, dx = run(**tensors, dy=dy, bounds=bounds, dbias=slices.views["bias"])
    tolerance.reference(reference, tensors).check([y])
    check_by_task(reference, tensors, dy, bounds, {"x": dx}, slices.views)
    slices.assert_gaps_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 100, 768])
def test_within_the_error_budget(width: int, dtype: torch.dtype, every_device: torch.device) -> None:
    check(ROWS, width, AWKWARD_BOUNDS["three tasks"], dtype, every_device)


def test_fp16(triton: torch.device) -> None:
    check(ROWS, 100, AWKWARD_BOUNDS["three tasks"], torch.float16, triton)


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


@pytest.mark.usefixtures("native")
def test_many_chunks_of_rows() -> None:
    check(2311, 33, (0, 500, 503, 505, 2100, 2300), torch.float32, torch.device("cpu"))


def test_far_tails_are_exact(device: torch.device) -> None:
    """GELU is 0 far to the left and the identity far to the right, derivative included; no NaN from 0 * infinity."""
    x = torch.tensor([[-1e4, -40.0, 40.0, 1e4]], device=device)
    y, dx = run(x, torch.zeros(4, device=device), torch.ones_like(x), (0, 1), None)
    for got, exact in ((y, [[0.0, 0.0, 40.0, 1e4]]), (dx, [[0.0, 0.0, 1.0, 1.0]])):
        torch.testing.assert_close(got, torch.tensor(exact, device=device), rtol=0, atol=1e-30)


def test_deterministic(device: torch.device) -> None:
    tensors, dy = inputs(ROWS, 100, torch.float32, device)
    first, second = torch.empty(2, 2, 100, device=device)
    assert torch.equal(
        run(**tensors, dy=dy, bounds=(0, 11, 40), dbias=first)[1],
        run(**tensors, dy=dy, bounds=(0, 11, 40), dbias=second)[1],
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
@pytest.mark.usefixtures("native")
def test_nothing_to_compute(shape: tuple[int, int]) -> None:
    assert bias_gelu_forward(torch.zeros(shape), torch.ones(shape[1])).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("width", [1536, 3072])
def test_real_sizes(width: int, dtype: torch.dtype, triton: torch.device) -> None:
    check(2770, width, (0, 900, 1500, 2700), dtype, triton)
