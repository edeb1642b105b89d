# SPDX-License-Identifier: Apache-2.0
"""add_norm kernels: output, statistics and every gradient against fp64, by task; dropout agreement; determinism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert_fast.kernels.add_norm import add_norm_backward, add_norm_forward
from minbert_fast.ops import reference as plain
from minbert_fast.ops.dropout import keep_mask
from tests.kernels.task_gradients import DTYPES, ROWS, Slices, check_by_task, random
from tests.tolerance import AWKWARD_BOUNDS, assert_within_budget, reference

EPS = 1e-12
P = 0.2  # 1 / (1 - p) = 1.25 is exact in every dtype


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs by name, a cotangent and a seed."""
    generator = torch.Generator().manual_seed(width)
    shapes = {"x": (rows, width), "bias": (width,), "residual": (rows, width), "gamma": (width,), "beta": (width,)}
    tensors = {n: random(*s, dtype=dtype, device=device, generator=generator) for n, s in shapes.items()}
    dy = random(rows, width, dtype=dtype, device=device, generator=generator)
    return tensors, dy, torch.tensor([width + 2**40], device=device)


def check(rows: int, width: int, p: float, bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, dy, seed = inputs(rows, width, dtype, device)
    keep = keep_mask(seed, 3, torch.arange(rows, device=device), width, p)
    y, mean, rstd = add_norm_forward(*tensors.values(), EPS, p, seed, 3)
    reference(plain.add_norm, tensors, eps=EPS, keep=keep).check([y])
    z = tensors["residual"].double() + keep.double() * (tensors["x"].double() + tensors["bias"].double())
    torch.testing.assert_close(mean.double(), z.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), z.var(1, unbiased=False).add(EPS).rsqrt(), rtol=1e-5, atol=0)

    slices = Slices(len(bounds) - 1, dict.fromkeys(("gamma", "beta", "bias"), (width,)), torch.float32, device)
    constant = (tensors["x"], tensors["bias"], tensors["residual"], tensors["gamma"], mean, rstd)
    on_device = torch.tensor(bounds, dtype=torch.int32, device=device)
    dx, dresidual = add_norm_backward(dy, *constant, on_device, p, seed, 3, *slices.views.values())
    rowwise = {"x": dx, "residual": dresidual}
    check_by_task(plain.add_norm, tensors, dy, bounds, rowwise, slices.views, eps=EPS, keep=keep)
    slices.assert_gaps_untouched()


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 384])
def test_within_the_error_budget(width: int, dtype: torch.dtype, p: float, device: torch.device) -> None:
    check(ROWS, width, p, AWKWARD_BOUNDS["three tasks"], dtype, device)


@pytest.mark.parametrize("bounds", AWKWARD_BOUNDS.values(), ids=AWKWARD_BOUNDS)
def test_awkward_bounds(bounds: tuple[int, ...], device: torch.device) -> None:
    check(ROWS, 68, P, bounds, torch.float32, device)


@pytest.mark.parametrize("width", [1, 3, 1023, 4096])
def test_awkward_widths(width: int, device: torch.device) -> None:
    check(5, width, P, (0, 2, 5), torch.float32, device)


def test_one_row(device: torch.device) -> None:
    check(1, 768, 0.0, (0, 1), torch.float32, device)


def test_large_mean_does_not_cancel(device: torch.device) -> None:
    """A mean far above the spread: E[x^2] - E[x]^2 would lose every digit."""
    tensors, _, seed = inputs(8, 96, torch.float32, device)
    tensors["residual"] += 3000.0
    y, _, _ = add_norm_forward(*tensors.values(), EPS, 0.0, seed, 0)
    reference(plain.add_norm, tensors, eps=EPS).check([y])


def test_mixed_dtypes_equal_their_exact_image(device: torch.device) -> None:
    """fp32 parameters beside bf16 activations: the same as bf16 parameters of the same values."""
    tensors, _, seed = inputs(8, 96, torch.bfloat16, device)
    wide = {n: t.float() if t.dim() == 1 else t for n, t in tensors.items()}
    narrow = add_norm_forward(*tensors.values(), EPS, P, seed, 1)
    for a, b in zip(narrow, add_norm_forward(*wide.values(), EPS, P, seed, 1), strict=True):
        assert torch.equal(a, b)


def test_backward_draws_the_forward_mask(device: torch.device) -> None:
    """dx is zero exactly where the forward dropped x: found from outputs alone, with x the only large input."""
    tensors, dy, seed = inputs(8, 96, torch.float32, device)
    tensors["residual"].zero_()
    y, mean, rstd = add_norm_forward(*tensors.values(), EPS, 0.5, seed, 9)
    xhat = (y - tensors["beta"]) / tensors["gamma"]
    dropped = (xhat / rstd[:, None] + mean[:, None]).abs() < 1e-4  # the sum that was normalised, where it is zero
    bounds = torch.tensor([0, 8], dtype=torch.int32, device=device)
    constant = (tensors["x"], tensors["bias"], tensors["residual"], tensors["gamma"], mean, rstd)
    dx, dresidual = add_norm_backward(dy, *constant, bounds, 0.5, seed, 9, None, None, None)
    assert 0.4 < float(dropped.float().mean()) < 0.6
    assert torch.equal(dx == 0, dropped)
    assert (dresidual != 0).all()


def test_deterministic_and_bf16_outputs(device: torch.device) -> None:
    tensors, dy, seed = inputs(ROWS, 96, torch.float32, device)
    _, mean, rstd = add_norm_forward(*tensors.values(), EPS, P, seed, 1)
    bounds = torch.tensor([0, 11, 40], dtype=torch.int32, device=device)
    constant = (tensors["x"], tensors["bias"], tensors["residual"], tensors["gamma"], mean, rstd)

    def gradients(dtype: torch.dtype) -> Tensor:
        out = torch.empty(3, 2, 96, dtype=dtype, device=device)
        add_norm_backward(dy, *constant, bounds, P, seed, 1, *out)
        return out

    first = gradients(torch.float32)
    assert torch.equal(first, gradients(torch.float32))
    assert_within_budget(gradients(torch.bfloat16), first.double(), first.bfloat16())


def test_only_the_wanted_gradients(device: torch.device) -> None:
    tensors, dy, seed = inputs(6, 64, torch.float32, device)
    _, mean, rstd = add_norm_forward(*tensors.values(), EPS, 0.0, seed, 0)
    bounds = torch.tensor([0, 6], dtype=torch.int32, device=device)
    constant = (tensors["x"], tensors["bias"], tensors["residual"], tensors["gamma"], mean, rstd)
    dbeta = torch.empty(1, 64, device=device)
    add_norm_backward(dy, *constant, bounds, 0.0, seed, 0, None, dbeta, None)
    torch.testing.assert_close(dbeta[0], dy.sum(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 768, 1024, 4096])
def test_real_sizes(width: int, dtype: torch.dtype, device: torch.device) -> None:
    check(2770, width, P, (0, 900, 1500, 2700), dtype, device)


@pytest.mark.gpu
def test_rows_beyond_int32_elements(device: torch.device) -> None:
    """2^31 elements and more: the last rows are reached, and match the same rows alone."""
    rows, width = 2**31 // 4096 + 64, 4096
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    x[-64:] = torch.randn(64, width, device=device)
    vector = torch.ones(width, device=device)
    y, _, _ = add_norm_forward(x, vector, x, vector, vector, EPS, 0.0, None, 0)
    alone, _, _ = add_norm_forward(x[-64:].clone(), vector, x[-64:].clone(), vector, vector, EPS, 0.0, None, 0)
    assert torch.equal(y[-64:], alone)


@pytest.mark.parametrize(("p", "seeded"), [(1.0, True), (-0.1, True), (float("nan"), True), (0.1, False)])
def test_bad_dropout_is_refused(p: float, seeded: bool, device: torch.device) -> None:
    tensors, _, seed = inputs(2, 64, torch.float32, device)
    with pytest.raises(ValueError, match="dropout"):
        add_norm_forward(*tensors.values(), EPS, p, seed if seeded else None, 0)


def test_width_beyond_the_table_is_refused(device: torch.device) -> None:
    tensors, _, seed = inputs(2, 4097, torch.float32, device)
    with pytest.raises(ValueError, match="4097"):
        add_norm_forward(*tensors.values(), EPS, 0.0, seed, 0)
