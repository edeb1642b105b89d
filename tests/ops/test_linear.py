# SPDX-License-Identifier: Apache-2.0
"""linear on every floor: every task's weight and bias gradient against fp64, in every dtype and on awkward bounds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops.backend import triton_available
from minbert_fast.ops.linear import linear_gradients
from tests.ops.common import DTYPES, ROWS, Slices, int32, random
from tests.tolerance import AWKWARD_BOUNDS, assert_within_budget


def inputs(rows: int, outputs: int, ins: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """dy [rows, outputs] and x [rows, ins], both slices of wider tensors."""
    generator = torch.Generator().manual_seed(outputs)
    dy = random(rows, outputs + 16, dtype=dtype, device=device, generator=generator)[:, :outputs]
    x = random(rows, ins + 32, dtype=dtype, device=device, generator=generator)[:, :ins]
    return dy, x


def check(
    shape: tuple[int, int],
    bounds: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    out: torch.dtype = torch.float32,
    rows: int = ROWS,
) -> None:
    dy, x = inputs(rows, *shape, dtype, device)
    dy[bounds[-1] :] = torch.nan  # padding rows must not affect any task
    slices = Slices(len(bounds) - 1, {"weight": shape, "bias": shape[:1]}, out, device)
    linear_gradients(dy, x, int32(*bounds, device=device), slices.views["weight"], slices.views["bias"])
    for task, (begin, end) in enumerate(itertools.pairwise(bounds)):
        a, b = dy[begin:end], x[begin:end]
        exact = {"weight": a.double().T @ b.double(), "bias": a.double().sum(0)}
        usual = {"weight": a.T @ b, "bias": a.sum(0)}
        for name, view in slices.views.items():
            assert_within_budget(
                view[task], exact[name], usual[name].to(out), rows=max(end - begin, 1), name=f"{name} of task {task}"
            )
    slices.assert_gaps_untouched()


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (100, 36)])
def test_within_the_error_budget(
    shape: tuple[int, int], dtype: torch.dtype, out: torch.dtype, every_device: torch.device
) -> None:
    check(shape, AWKWARD_BOUNDS["three tasks"], dtype, every_device, out)


def test_fp16(triton: torch.device) -> None:
    check((96, 160), AWKWARD_BOUNDS["three tasks"], torch.float16, triton)


@pytest.mark.parametrize("bounds", AWKWARD_BOUNDS.values(), ids=AWKWARD_BOUNDS)
def test_awkward_bounds(bounds: tuple[int, ...], device: torch.device) -> None:
    check((48, 32), bounds, torch.float32, device)


if triton_available():
    from minbert_fast.kernels import linear as kernels

    @pytest.mark.parametrize("tile", [kernels.TILE_HOPPER, *kernels.TILES, kernels.TILE_UNALIGNED])
    def test_every_tile(tile: kernels.Tile, triton: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each tile of the table, more than one of it in each direction, more than a group of them along the outputs."""
        monkeypatch.setattr(kernels, "choose", lambda dy, x, tasks: replace(tile, rows=32))
        monkeypatch.setattr(kernels, "GROUP", 2)
        shape = (2 * tile.outputs + 16, tile.inputs + 16)
        check(shape, (0, 33, 36), torch.float16, triton)


def test_sums_are_wide(device: torch.device) -> None:
    """4,096 ones: a sum kept in bf16 would stop at 256. (A CPU rounds the product to bf16, whose 4,096 is exact.)"""
    ones = torch.ones(4096, 16, dtype=torch.bfloat16, device=device)
    weight, bias = torch.empty(1, 16, 16, device=device), torch.empty(1, 16, device=device)
    linear_gradients(ones, ones, int32(0, 4096, device=device), weight, bias)
    assert (weight == 4096).all()
    assert (bias == 4096).all()


@pytest.mark.usefixtures("native")
def test_bias_gradients_of_bf16_activations_are_summed_in_fp32() -> None:
    dy, x = inputs(1000, 30, 8, torch.bfloat16, torch.device("cpu"))
    wide, narrow = torch.empty(2, 40)[:, :30], torch.empty(2, 30, dtype=torch.bfloat16)
    linear_gradients(dy, x, int32(0, 700, 1000), None, wide)
    linear_gradients(dy, x, int32(0, 700, 1000), None, narrow)
    exact = torch.stack([dy[:700].double().sum(0), dy[700:].double().sum(0)])
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-4)
    assert torch.equal(wide.bfloat16(), narrow)


@pytest.mark.parametrize("wanted", ["weight", "bias"])
def test_one_of_two_outputs(wanted: str, device: torch.device) -> None:
    dy, x = inputs(ROWS, 48, 32, torch.float32, device)
    bounds = int32(0, 10, 40, device=device)
    both = {"weight": torch.empty(2, 48, 32, device=device), "bias": torch.empty(2, 48, device=device)}
    linear_gradients(dy, x, bounds, both["weight"], both["bias"])
    one = torch.empty_like(both[wanted])
    linear_gradients(dy, x, bounds, one if wanted == "weight" else None, one if wanted == "bias" else None)
    assert torch.equal(one, both[wanted])


def test_deterministic(device: torch.device) -> None:
    dy, x = inputs(ROWS, 96, 64, torch.float32, device)
    bounds = int32(0, 10, 40, device=device)
    first, second = torch.empty(2, 2, 96, 64, device=device)
    linear_gradients(dy, x, bounds, first, None)
    linear_gradients(dy, x, bounds, second, None)
    assert torch.equal(first, second)


def test_a_layer_with_a_sink_backpropagates(device: torch.device) -> None:
    """dx is dy W; the sink has each task's gradients."""
    dy, x = inputs(ROWS, 48, 32, torch.float32, device)
    weight, bounds = torch.randn(48, 32, device=device), int32(0, 10, 40, device=device)
    x = x.clone().requires_grad_()
    dweight = torch.empty(2, 48, 32, device=device)
    y = ops.linear(x, weight, None, ops.LinearSink(bounds, dweight))
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight)
    torch.testing.assert_close(dweight[1], dy[10:].T @ x.detach()[10:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (768, 768), (2304, 768), (3072, 768)])
def test_real_sizes(shape: tuple[int, int], dtype: torch.dtype, triton: torch.device) -> None:
    check(shape, (0, 900, 1500, 2700), dtype, triton, rows=2770)
