# SPDX-License-Identifier: Apache-2.0
"""Promises that all ops with parameters share: plain autograd, sinks, torch.library, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops import backend
from minbert_fast.ops.add_norm import add_norm_backward, add_norm_forward
from minbert_fast.ops.bias_gelu import bias_gelu_backward, bias_gelu_forward
from minbert_fast.ops.embedding import embedding_backward, embedding_forward
from minbert_fast.ops.linear import linear_gradients
from tests.ops.cases import EPS, NAMES, SITE, WITH_DROPOUT, Case, make, packed
from tests.ops.common import Slices, int32

VARIANTS = [(name, 0.0) for name in NAMES] + [(name, 0.25) for name in WITH_DROPOUT]
TASKS = 3


def leaves(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors.values()]


def views_of(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return Slices(TASKS, case.views, dtype, device).views


# ---- Plain autograd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "p"), VARIANTS)
def test_gradcheck(name: str, p: float) -> None:
    case = make(name, p)
    assert torch.autograd.gradcheck(case.call, leaves(case.inputs), fast_mode=True)


@pytest.mark.parametrize(("name", "p"), VARIANTS)
def test_equals_the_formula_under_plain_autograd(name: str, p: float, device: torch.device) -> None:
    """Output and the gradients of all inputs: same inputs and seed, same mask."""
    case, exact = make(name, p, torch.float32, device), make(name, p)

    def run(inputs: list[Tensor], call: Any) -> list[Tensor]:
        y = call(*inputs)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *torch.autograd.grad(y, inputs, cotangent)]

    for a, b in zip(run(leaves(case.inputs), case.call), run(leaves(exact.inputs), exact.formula), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["add_norm", "bias_gelu", "linear"])
def test_leading_dimensions(name: str) -> None:
    case = make(name, 0.0, torch.float32)
    flat = {n: t[:15] if n in case.activations else t for n, t in case.inputs.items()}
    deep = {n: t.unflatten(0, (3, 5)) if n in case.activations else t for n, t in flat.items()}
    torch.testing.assert_close(case.call(*deep.values()).flatten(0, 1), case.call(*flat.values()))


@pytest.mark.parametrize("name", ["add_norm", "bias_gelu"])
def test_expanded_cotangent_and_strided_input(name: str, device: torch.device) -> None:
    """`.sum()` gives an op a gradient of stride 0; a transpose gives it an input that is not contiguous."""
    case = make(name, 0.0, torch.float32, device)
    x, *others = leaves(case.inputs)
    got = torch.autograd.grad(case.call(x.T.contiguous().T, *others).sum(), others)
    y = case.call(x, *others)
    for a, b in zip(got, torch.autograd.grad(y, others, torch.ones_like(y)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_differentiable_once(name: str, kernels: torch.device) -> None:
    """A second derivative is an error, not a silent zero."""
    case = make(name, 0.0, torch.float32, kernels)
    if name == "linear":
        pytest.skip("without a sink this is torch's own linear")
    inputs = leaves(case.inputs)
    (first,) = torch.autograd.grad(case.call(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


# ---- Sinks: one backward equals one a task (test_<op>.py checks the numbers) ----------------------------------------


def run(case: Case, views: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor | None]:
    """One forward and backward into `views`; the activations' gradients."""
    inputs = {n: t.clone().requires_grad_(n in case.activations) for n, t in case.inputs.items()}
    y = case.call(*inputs.values(), into=case.sink(packed(cotangent.device).task_tokens, **views))
    y.backward(cotangent)
    return {n: inputs[n].grad for n in case.activations}


def cotangent_of(case: Case) -> Tensor:
    """Random, and zero in the padding, as the op behind in a backward leaves it."""
    out = case.formula(*case.inputs.values())
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    cotangent[packed().num_tokens :] = 0
    return cotangent


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_constants(name: str, device: torch.device) -> None:
    """Their `.grad` stays untouched though they require grad."""
    case = make(name, 0.0, torch.float32, device)
    inputs = {n: t.clone().requires_grad_() for n, t in case.inputs.items()}
    sink = case.sink(packed(device).task_tokens, **views_of(case, torch.float32, device))
    case.call(*inputs.values(), into=sink).sum().backward()
    assert all(inputs[n].grad is None for n in case.parameters)
    assert all(inputs[n].grad is not None for n in case.activations)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_left_out(name: str, device: torch.device) -> None:
    """A sink without views still backpropagates; with one view, that one alone is as with all of them."""
    case = make(name, 0.0, torch.float32, device)
    cotangent, everything = cotangent_of(case), views_of(case, torch.float32, device)
    usual = run(case, everything, cotangent)
    for wanted in [(), *((n,) for n in case.parameters)]:
        some = Slices(TASKS, {n: case.views[n] for n in wanted}, torch.float32, device).views
        activations = run(case, some, cotangent)
        for n in case.activations:
            assert torch.equal(activations[n], usual[n])  # type: ignore[arg-type]
        for n in wanted:
            torch.testing.assert_close(some[n], everything[n])


@pytest.mark.parametrize("name", NAMES)
def test_backward_runs_where_nothing_requires_grad(name: str, device: torch.device) -> None:
    """The first op of a model frozen below it, with gradients in bf16, gets its backward all the same."""
    case = make(name, 0.0, torch.float32, device)
    slices = Slices(TASKS, case.views, torch.bfloat16, device)
    y = case.call(*case.inputs.values(), into=case.sink(packed(device).task_tokens, **slices.views))
    assert y.requires_grad
    y.backward(cotangent_of(case))
    assert all(torch.isfinite(view).all() for view in slices.views.values())
    slices.assert_gaps_untouched()


def test_a_stack_of_ops_shares_one_buffer(device: torch.device) -> None:
    """Views of one J under several ops: writing one does not trip autograd's version checks of another."""
    bounds = packed(device).task_tokens
    x, weight, bias = make("linear", 0.0, torch.float32, device).inputs.values()
    views = Slices(TASKS, {"a": (24, 20), "b": (24, 24), "c": (24,), "d": (24,)}, torch.float32, device).views
    y = ops.linear(x, weight, into=ops.LinearSink(bounds, views["a"]))
    y = ops.bias_gelu(y, bias, ops.BiasGeluSink(bounds, views["c"]))
    y = ops.linear(y, weight @ weight.T, bias, ops.LinearSink(bounds, views["b"], views["d"]))
    y.square().sum().backward()
    assert all(torch.isfinite(view).all() for view in views.values())
    assert all(view[1].count_nonzero() == 0 for view in views.values())  # the task without sentences


# ---- torch.library --------------------------------------------------------------------------------------------------


def _schema_calls() -> list[Any]:
    rows, width = 6, 8
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    drop = (0.25, torch.tensor([3]), SITE)
    bounds = int32(0, 2, 6)
    mean, rstd = draw(rows), draw(rows).abs()
    x, dy, vector = draw(rows, width), draw(rows, width), draw(width)
    index = [torch.arange(rows, dtype=torch.int32) % size for size in (4, 3, 2)]
    lookup = (*index, *(draw(size, width) for size in (4, 3, 2)), vector)
    words = (int32(0, 3, 6), torch.argsort(index[0], stable=True).int(), int32(0, 2, 4, 5, 6))
    small = (draw(2, width), None)
    calls = {
        add_norm_forward: (x, vector, dy, draw(width), draw(width), EPS, *drop),
        add_norm_backward: (dy, x, vector, draw(rows, width), draw(width), mean, rstd, bounds, *drop, *small, None),
        bias_gelu_forward: (x, vector),
        bias_gelu_backward: (dy, x, vector, bounds, draw(2, width)),
        embedding_forward: (*lookup, draw(width), EPS, *drop),
        embedding_backward: (
            dy, *lookup, mean, rstd, bounds, *words, *drop, draw(2, 4, width), draw(2, 3, width), None, *small, 1
        ),
        linear_gradients: (dy, x, bounds, draw(2, width, width), draw(2, width)),
    }  # fmt: skip
    return [pytest.param(op, arguments, id=op.name.partition("::")[2]) for op, arguments in calls.items()]


@pytest.mark.parametrize(("op", "arguments"), _schema_calls())
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    """Schemas tell the truth about mutation and aliasing, fakes about shapes."""
    torch.library.opcheck(op.overload, arguments)


# ---- Refusals -------------------------------------------------------------------------------------------------------


def test_refusals_name_what_is_wrong() -> None:
    x, vector, seed = torch.zeros(4, 8), torch.zeros(8), torch.tensor([1])
    with pytest.raises(ValueError, match=r"residual must be torch.float32 \[4, 8\], not torch.float32 \[3, 8\]"):
        ops.add_norm(x, vector, torch.zeros(3, 8), vector, vector, EPS)
    with pytest.raises(ValueError, match=r"gamma must be \[8\], not \[7\]"):
        ops.add_norm(x, vector, x, torch.zeros(7), vector, EPS)
    index = torch.zeros(4, dtype=torch.int32)
    for p, given in ((1.0, seed), (-0.5, seed), (float("nan"), seed), (0.1, None)):
        with pytest.raises(ValueError, match="dropout needs"):
            ops.add_norm(x, vector, x, vector, vector, EPS, p, given)
        with pytest.raises(ValueError, match="dropout needs"):
            ops.embedding(index, index, index, x, x, x, vector, vector, EPS, p, given)
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        ops.bias_gelu(x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"position must be torch.float32 \[3, 8\], not torch.float32 \[3, 7\]"):
        ops.embedding(index, index, index, x, torch.zeros(3, 7), x, vector, vector, EPS)
    with pytest.raises(ValueError, match=r"tokens must be torch.int32 \[4\]"):
        ops.embedding(index.long(), index, index, x, x, x, vector, vector, EPS)


def test_one_implementation_at_a_time() -> None:
    before = backend.implementation(torch.zeros(1))
    with backend.force("torch"):
        with backend.force("triton"):
            assert backend.implementation(torch.zeros(1)) == "triton"
        assert backend.implementation(torch.zeros(1)) == "torch"
    assert backend.implementation(torch.zeros(1)) == before == "native"
