# SPDX-License-Identifier: Apache-2.0
"""cosine on every floor: values and both gradients against fp64, with rows of every length."""

from __future__ import annotations

import pytest
import torch

from minbert_fast.ops.backend import force
from minbert_fast.ops.cosine import EPS, cosine, cosine_backward, cosine_forward, reference
from tests import tolerance
from tests.ops.common import DTYPES, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 2), (5, 3), (3, 384), (2, 1025), (0, 4)])
def test_within_the_error_budget(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (random(rows, width, dtype=dtype, device=device, generator=generator).requires_grad_() for _ in range(2))
    dcosine = random(rows, dtype=dtype, device=device, generator=generator)
    found = cosine(u, v)
    gradients = torch.autograd.grad(found, (u, v), dcosine)
    tolerance.reference(reference, {"u": u.detach(), "v": v.detach()}, [dcosine]).check([found, *gradients])


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-9, 1e-3, 1e12])
def test_rows_of_every_length(length: float, device: torch.device) -> None:
    """A zero row gives 0 and a finite gradient; rows below EPS are divided by EPS. Parallel and opposite rows too."""
    generator = torch.Generator().manual_seed(1)
    u = random(6, 7, dtype=torch.float32, device=device, generator=generator)
    v = torch.cat([random(3, 7, dtype=torch.float32, device=device, generator=generator), u[3:5], -u[5:]])
    u[[0, 3]] *= length
    v[[1, 3]] *= length
    u, v = u.requires_grad_(), v.requires_grad_()
    dcosine = torch.linspace(-1, 2, 6, device=device)
    found, expected = cosine(u, v), reference(u, v)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for x in (u, v):
        one, other = (torch.autograd.grad(y, x, dcosine, retain_graph=True)[0] for y in (found, expected))
        unit = x.detach().norm(dim=1, keepdim=True).clamp_min(EPS)  # a gradient's rounding is that of 1 / length
        torch.testing.assert_close(one * unit, other * unit, atol=1e-5, rtol=1e-5)
        assert one.isfinite().all()


def test_expanded_and_strided_rows(device: torch.device) -> None:
    u = torch.randn(1, 8, device=device).expand(4, 8)
    v = torch.randn(8, 4, device=device).T
    torch.testing.assert_close(cosine(u, v), reference(u, v))
    torch.testing.assert_close(cosine(u[:1], v), reference(u[:1], v))


def test_differentiable_once(triton: torch.device) -> None:
    u = torch.randn(3, 4, device=triton, requires_grad=True)
    (first,) = torch.autograd.grad(cosine(u, u + 1).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_opcheck() -> None:
    u, v = torch.randn(2, 5, 4)
    with force("triton"):
        torch.library.opcheck(cosine_forward.overload, (u, v, EPS))
        found, norms = cosine_forward(u, v, EPS)
        torch.library.opcheck(cosine_backward.overload, (found, u, v, found, norms, EPS))
