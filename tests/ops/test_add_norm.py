# SPDX-License-Identifier: Apache-2.0
"""add_norm on every floor: output and every gradient against fp64, by task; dropout; determinism; awkward sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops.add_norm import add_norm_forward, reference
from minbert_fast.ops.dropout import keep_mask
from tests import tolerance
from tests.ops.common import DTYPES, EPS, ROWS, P, Slices, check_by_task, int32, random
from tests.tolerance import AWKWARD_BOUNDS, assert_within_budget


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs by name, a cotangent and a seed."""
    generator = torch.Generator().manual_seed(width)
    shapes = {"x": (rows, width), "bias": (width,), "residual": (rows, width), "gamma": (width,), "beta": (width,)}
    tensors = {n: random(*s, dtype=dtype, device=device, generator=generator) for n, s in shapes.items()}
    dy = random(rows, width, dtype=dtype, device=device, generator=generator)
    return tensors, dy, torch.tensor([width + 2**40], device=device)


def run(
    tensors: dict[str, Tensor], dy: Tensor, seed: Tensor, p: float, bounds: tuple[int, ...], **views: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dresidual; the parameters' gradients go into `views` (gamma, beta, bias)."""
    x, residual = (tensors[n].clone().requires_grad_() for n in ("x", "residual"))
    sink = ops.AddNormSink(int32(*bounds, device=dy.device), *(views.get(n) for n in ("gamma", "beta", "bias")))
    y = ops.add_norm(x, tensors["bias"], residual, tensors["gamma"], tensors["beta"], EPS, p, seed, 3, sink)
    y.backward(dy)
    assert x.grad is not None
    assert residual.grad is not None
    return y.detach(), x.grad, residual.grad


def check(rows: int, width: int, p: float, bounds: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, dy, seed = inputs(rows, width, dtype, device)
    keep = keep_mask(seed, 3, torch.arange(rows, device=device), width, p)
    slices = Slices(len(bounds) - 1, dict.fromkeys(("gamma", "beta", "bias"), (width,)), torch.float32, device)
    y, dx, dresidual = run(tensors, dy, seed, p, bounds, **slices.views)
    tolerance.reference(reference, tensors, eps=EPS, keep=keep).check([y])
    rowwise = {"x": dx, "residual": dresidual}
    check_by_task(reference, tensors, dy, bounds, rowwise, slices.views, eps=EPS, keep=keep)
    slices.assert_gaps_untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "p"), [(3, P), (100, P), (384, 0.0)])
def test_within_the_error_budget(width: int, dtype: torch.dtype, p: float, every_device: torch.device) -> None:
    check(ROWS, width, p, AWKWARD_BOUNDS["three tasks"], dtype, every_device)


def test_fp16(triton: torch.device) -> None:
    check(ROWS, 100, P, AWKWARD_BOUNDS["three tasks"], torch.float16, triton)


@pytest.mark.parametrize("bounds", AWKWARD_BOUNDS.values(), ids=AWKWARD_BOUNDS)
def test_awkward_bounds(bounds: tuple[int, ...], device: torch.device) -> None:
    check(ROWS, 68, P, bounds, torch.float32, device)


@pytest.mark.parametrize("width", [1, 64, 1023, 4096])
def test_awkward_widths(width: int, device: torch.device) -> None:
    check(5, width, P, (0, 2, 5), torch.float32, device)


def test_one_row(device: torch.device) -> None:
    check(1, 768, 0.0, (0, 1), torch.float32, device)


@pytest.mark.usefixtures("native")
def test_many_chunks_of_rows() -> None:
    """Enough rows that tasks begin within chunks, end within them, and share one with two others."""
    check(2311, 33, P, (0, 500, 503, 505, 2100, 2300), torch.float32, torch.device("cpu"))


def test_a_row_of_one_column_has_no_gradient(kernels: torch.device) -> None:
    """Its own mean, so the output is beta. Rounding errors times rstd once gave 5e-4 on an H100, more on a CPU."""
    tensors, dy, seed = inputs(64, 1, torch.float32, kernels)
    gamma = torch.empty(1, 1, device=kernels)
    y, dx, dresidual = run(tensors, dy, seed, P, (0, 64), gamma=gamma)
    assert torch.equal(y, tensors["beta"].expand(64, 1))
    assert not dx.any()
    assert not dresidual.any()
    assert not gamma.any()


def test_large_mean_does_not_cancel(device: torch.device) -> None:
    """A mean far above the spread: E[x^2] - E[x]^2 would lose every digit."""
    tensors, dy, seed = inputs(8, 96, torch.float32, device)
    tensors["residual"] += 3000.0
    tolerance.reference(reference, tensors, eps=EPS).check([run(tensors, dy, seed, 0.0, (0, 8))[0]])


def test_mixed_dtypes_equal_their_exact_image(device: torch.device) -> None:
    """fp32 parameters with bf16 activations give the result of bf16 parameters with the same values."""
    tensors, dy, seed = inputs(8, 96, torch.bfloat16, device)
    wide = {n: t.float() if t.dim() == 1 else t for n, t in tensors.items()}
    for a, b in zip(run(tensors, dy, seed, P, (0, 8)), run(wide, dy, seed, P, (0, 8)), strict=True):
        assert torch.equal(a, b)


def test_backward_draws_the_forward_mask(device: torch.device) -> None:
    """dx is zero exactly where dropout drops; dresidual is not."""
    tensors, dy, seed = inputs(8, 96, torch.float32, device)
    _, dx, dresidual = run(tensors, dy, seed, 0.5, (0, 8))
    dropped = keep_mask(seed, 3, torch.arange(8, device=device), 96, 0.5) == 0
    assert 0.4 < float(dropped.float().mean()) < 0.6
    assert torch.equal(dx == 0, dropped)
    assert (dresidual != 0).all()


def test_deterministic_and_bf16_gradients(device: torch.device) -> None:
    tensors, dy, seed = inputs(ROWS, 96, torch.float32, device)

    def gradients(dtype: torch.dtype) -> Tensor:
        out = torch.empty(3, 2, 96, dtype=dtype, device=device)
        run(tensors, dy, seed, P, (0, 11, 40), gamma=out[0], beta=out[1], bias=out[2])
        return out

    first = gradients(torch.float32)
    assert torch.equal(first, gradients(torch.float32))
    assert_within_budget(gradients(torch.bfloat16), first.double(), first.bfloat16())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_spoils_no_other(dtype: torch.dtype, poison: float) -> None:
    tensors, dy, seed = inputs(9, 40, dtype, torch.device("cpu"))
    tensors["x"][2, 3] = poison
    y = run(tensors, dy, seed, 0.0, (0, 9))[0]
    assert y[2].isnan().all()
    assert torch.isfinite(y[3:]).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("width", [0, 8193])
def test_widths_that_the_extension_refuses(width: int) -> None:
    x, vector = torch.zeros(1, width), torch.zeros(width)
    with pytest.raises(ValueError, match=f"the hidden size must be 1 to 8192, not {width}"):
        add_norm_forward(x, vector, x, vector, vector, EPS, 0.0, None, 0)


def test_width_beyond_the_table_is_refused(triton: torch.device) -> None:
    tensors, dy, seed = inputs(2, 4097, torch.float32, triton)
    with pytest.raises(ValueError, match="4097"):
        run(tensors, dy, seed, 0.0, (0, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("width", [384, 768, 1024, 4096])
def test_real_sizes(width: int, dtype: torch.dtype, triton: torch.device) -> None:
    check(2770, width, P, (0, 900, 1500, 2700), dtype, triton)


@pytest.mark.gpu
def test_rows_beyond_int32_elements(triton: torch.device) -> None:
    """2^31 elements and more: the last rows are reached, and match the same rows alone."""
    rows, width = 2**31 // 4096 + 64, 4096
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=triton)
    x[-64:] = torch.randn(64, width, device=triton)
    vector = torch.ones(width, device=triton)
    y = add_norm_forward(x, vector, x, vector, vector, EPS, 0.0, None, 0)[0]
    alone = add_norm_forward(x[-64:].clone(), vector, x[-64:].clone(), vector, vector, EPS, 0.0, None, 0)[0]
    assert torch.equal(y[-64:], alone)
