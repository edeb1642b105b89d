# SPDX-License-Identifier: Apache-2.0
"""The ops under plain autograd: gradcheck, agreement of implementations, opcheck, shapes, and refusals."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops import backend
from tests.functional.cases import EPS, NAMES, SITE, WITH_DROPOUT, make

VARIANTS = [(name, 0.0) for name in NAMES] + [(name, 0.25) for name in WITH_DROPOUT]


def leaves(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors.values()]


@pytest.mark.parametrize(("name", "p"), VARIANTS)
def test_gradcheck(name: str, p: float) -> None:
    case = make(name, p)
    with backend.force("torch"):
        assert torch.autograd.gradcheck(case.call, leaves(case.inputs), fast_mode=True)


@pytest.mark.parametrize(("name", "p"), VARIANTS)
def test_reference_formula(name: str, p: float) -> None:
    case = make(name, p)
    with backend.force("torch"):
        torch.testing.assert_close(case.call(*case.inputs.values()), case.formula(*case.inputs.values()))


@pytest.mark.parametrize(("name", "p"), VARIANTS)
@pytest.mark.parametrize("choice", ["triton", "native"])
def test_implementations_agree(name: str, p: float, choice: Any) -> None:
    """Same inputs and seed, same mask, same output and gradients."""
    case = make(name, p, torch.float32)

    def run(implementation: Any) -> list[Tensor]:
        with backend.force(implementation):
            inputs = leaves(case.inputs)
            y = case.call(*inputs)
            cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            return [y, *torch.autograd.grad(y, inputs, cotangent)]

    for a, b in zip(run(choice), run("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["add_norm", "bias_gelu", "linear"])
def test_leading_dimensions(name: str) -> None:
    case = make(name, 0.0, torch.float32)
    flat = {n: t[:15] if n in case.activations else t for n, t in case.inputs.items()}
    deep = {n: t.unflatten(0, (3, 5)) if n in case.activations else t for n, t in flat.items()}
    torch.testing.assert_close(case.call(*deep.values()).flatten(0, 1), case.call(*flat.values()))


def test_expanded_cotangent_and_strided_input() -> None:
    """What `.sum()` and a transpose hand to an op: a gradient of stride 0, an input that is not contiguous."""
    case = make("add_norm", 0.0, torch.float32)
    x, bias, residual, gamma, beta = leaves(case.inputs)
    strided = x.T.contiguous().T
    for choice in ("torch", "triton"):
        with backend.force(choice):
            got = torch.autograd.grad(case.call(strided, bias, residual, gamma, beta).sum(), beta)[0]
        torch.testing.assert_close(got, torch.full_like(beta, len(x)))


def _schema_calls() -> list[Any]:
    rows, width = 6, 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    seed = torch.tensor([3])
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    mean, rstd = draw(rows), draw(rows).abs()
    x, dy, vector = draw(rows, width), draw(rows, width), draw(width)
    index = [torch.arange(rows, dtype=torch.int32) % size for size in (4, 3, 2)]
    tables = [draw(size, width) for size in (4, 3, 2)]
    order = torch.argsort(index[0], stable=True).int()
    offsets = torch.tensor([0, 2, 4, 5, 6], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32)
    learned = [t.clone().requires_grad_() for t in tables]
    calls: dict[str, tuple[Any, ...]] = {
        "add_norm": (draw(rows, width, grad=True), draw(width, grad=True), draw(rows, width, grad=True),
                     draw(width, grad=True), draw(width, grad=True), EPS, 0.25, seed, SITE),
        "add_norm_backward": (dy, x, vector, draw(rows, width), draw(width), mean, rstd, bounds, 0.25, seed, SITE,
                              draw(2, width), None, draw(2, width)),
        "bias_gelu": (draw(rows, width, grad=True), draw(width, grad=True)),
        "bias_gelu_backward": (dy, x, vector, bounds, draw(2, width)),
        "embedding": (*index, *learned, draw(width, grad=True), draw(width, grad=True), EPS, 0.25, seed, SITE),
        "embedding_norm_backward": (dy, *index, *tables, vector, mean, rstd, bounds, 0.25, seed, SITE,
                                    draw(2, width), draw(2, width), draw(2, 2, width)),
        "embedding_gather": (dy, bounds, cu_seqlens, order, offsets, draw(2, 4, width), None),
        "segment_gradients": (dy, x, bounds, draw(2, width, width), draw(2, width)),
    }  # fmt: skip
    return [pytest.param(op, arguments, id=op) for op, arguments in calls.items()]


@pytest.mark.parametrize(("op", "arguments"), _schema_calls())
def test_opcheck(op: str, arguments: tuple[Any, ...]) -> None:
    """Schemas tell the truth about mutation and aliasing, fakes about shapes, and autograd is registered."""
    import_module("minbert_fast.ops")
    torch.library.opcheck(getattr(torch.ops.minbert_fast, op).default, arguments)


def test_refusals_name_what_is_wrong() -> None:
    x, vector, seed = torch.zeros(4, 8), torch.zeros(8), torch.tensor([1])
    with pytest.raises(ValueError, match=r"residual .* does not match x"):
        ops.add_norm(x, vector, torch.zeros(3, 8), vector, vector, EPS)
    with pytest.raises(ValueError, match=r"gamma must have shape \[8\], not \[7\]"):
        ops.add_norm(x, vector, x, torch.zeros(7), vector, EPS)
    for p, given in ((1.0, seed), (-0.5, seed), (0.1, None)):
        with pytest.raises(ValueError, match="dropout"):
            ops.add_norm(x, vector, x, vector, vector, EPS, p, given)
    with pytest.raises(ValueError, match=r"bias must have shape \[8\]"):
        ops.bias_gelu(x, torch.zeros(3))
    index = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"position .* does not match word"):
        ops.embedding(index, index, index, x, torch.zeros(3, 7), x, vector, vector, EPS)
    with pytest.raises(ValueError, match=r"tokens must be int32 \[4\]"):
        ops.embedding(index.long(), index, index, x, x, x, vector, vector, EPS)
