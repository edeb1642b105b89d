# SPDX-License-Identifier: Apache-2.0
"""One backward into sinks equals one plain backward a task; parameters are constants; frozen ones are left out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops import backend
from tests.functional.cases import NAMES, WITH_DROPOUT, Case, make, packed
from tests.kernels.task_gradients import Slices

CHOICES = ["torch", "triton", "native"]
TASKS = 3


def run(case: Case, views: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor | None]:
    """One forward and backward into `views`; the activations' gradients."""
    inputs = {n: t.clone().requires_grad_(n in case.activations) for n, t in case.inputs.items()}
    y = case.call(*inputs.values(), into=case.sink(packed().task_tokens, **views))
    y.backward(cotangent)
    return {n: inputs[n].grad for n in case.activations}


def cotangent_of(case: Case) -> Tensor:
    """Random, and zero in the padding, as the op behind in a backward leaves it."""
    batch = packed()
    out = case.formula(*case.inputs.values())
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    cotangent[batch.num_tokens :] = 0
    return cotangent


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("name", "p"), [(n, 0.0) for n in NAMES] + [(n, 0.25) for n in WITH_DROPOUT])
def test_equals_a_backward_a_task(name: str, p: float, choice: Any) -> None:
    case, exact = make(name, p, torch.float32), make(name, p)
    cotangent = cotangent_of(exact)
    slices = Slices(TASKS, case.views, torch.float32, torch.device("cpu"))
    with backend.force(choice):
        activations = run(case, slices.views, cotangent.float())
    slices.assert_gaps_untouched()

    batch = packed()
    inputs = {n: t.clone().requires_grad_() for n, t in exact.inputs.items()}
    y = exact.formula(*inputs.values())
    whole = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), cotangent, retain_graph=True), strict=True))
    for each, gradient in activations.items():
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), whole[each], rtol=1e-5, atol=1e-5)
    for task, (begin, end) in enumerate(itertools.pairwise(batch.task_tokens.tolist())):
        own = torch.zeros_like(cotangent)
        own[begin:end] = cotangent[begin:end]
        wanted = torch.autograd.grad(y, [inputs[n] for n in case.parameters], own, retain_graph=True)
        for each, gradient in zip(case.parameters, wanted, strict=True):
            actual = slices.views[each][task].double()
            if each == "word":
                dense = torch.zeros_like(gradient)
                dense[batch.word_ids[: batch.num_words].long()] = actual[: batch.num_words]
                assert not actual[batch.num_words :].any()
                actual = dense
            torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=each: f"{n}: {m}")


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_constants(name: str, choice: Any) -> None:
    """Their `.grad` stays untouched though they require grad."""
    case = make(name, 0.0, torch.float32)
    inputs = {n: t.clone().requires_grad_() for n, t in case.inputs.items()}
    views = Slices(TASKS, case.views, torch.float32, torch.device("cpu")).views
    with backend.force(choice):
        case.call(*inputs.values(), into=case.sink(packed().task_tokens, **views)).sum().backward()
    assert all(inputs[n].grad is None for n in case.parameters)
    assert all(inputs[n].grad is not None for n in case.activations)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_left_out(name: str, choice: Any) -> None:
    """A sink without views still backpropagates; with one view, that one alone is as with all of them."""
    case = make(name, 0.0, torch.float32)
    cotangent = cotangent_of(case)
    everything = Slices(TASKS, case.views, torch.float32, torch.device("cpu")).views
    with backend.force(choice):
        usual = run(case, everything, cotangent)
        for wanted in [(), *((n,) for n in case.parameters)]:
            some = Slices(TASKS, {n: case.views[n] for n in wanted}, torch.float32, torch.device("cpu")).views
            activations = run(case, some, cotangent)
            for n in case.activations:
                assert torch.equal(activations[n], usual[n])  # type: ignore[arg-type]
            for n in wanted:
                torch.testing.assert_close(some[n], everything[n])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", NAMES)
def test_backward_runs_where_nothing_requires_grad(name: str, choice: Any) -> None:
    """The first op of a frozen-below model, with bf16 copies for weights, gets its backward all the same."""
    case = make(name, 0.0, torch.float32)
    cotangent = cotangent_of(case)
    slices = Slices(TASKS, case.views, torch.bfloat16, torch.device("cpu"))
    with backend.force(choice):
        y = case.call(*case.inputs.values(), into=case.sink(packed().task_tokens, **slices.views))
        assert y.requires_grad
        y.backward(cotangent)
    assert all(torch.isfinite(view).all() for view in slices.views.values())
    slices.assert_gaps_untouched()


@pytest.mark.parametrize("choice", ["torch", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_activations(name: str, choice: Any) -> None:
    """bf16 in, fp32 J: near the fp32 gradients on the same (bf16-representable) inputs."""
    narrow = make(name, 0.0, torch.bfloat16)
    wide = make(name, 0.0, torch.float32)
    wide.inputs.update({n: t.float() for n, t in narrow.inputs.items()})
    cotangent = cotangent_of(wide).bfloat16()
    results = []
    for case in (narrow, wide):
        views = Slices(TASKS, case.views, torch.float32, torch.device("cpu")).views
        with backend.force(choice):
            activations = run(case, views, cotangent.to(case.inputs[next(iter(case.inputs))].dtype))
        results.append([*views.values(), *(t.float() for t in activations.values() if t is not None)])
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm()) <= 2**-6 * float(b.norm())


def test_a_stack_of_ops_shares_one_buffer() -> None:
    """Views of one J under several ops: writing one does not trip autograd's version checks of another."""
    batch = packed()
    case = make("linear", 0.0, torch.float32)
    x, weight, bias = case.inputs.values()
    square = weight @ weight.T
    views = Slices(TASKS, {"a": (24, 20), "b": (24, 24), "c": (24,), "d": (24,)}, torch.float32, x.device).views
    y = ops.linear(x, weight, into=ops.LinearSink(batch.task_tokens, views["a"]))
    y = ops.bias_gelu(y, bias, ops.BiasGeluSink(batch.task_tokens, views["c"]))
    y = ops.linear(y, square, bias, ops.LinearSink(batch.task_tokens, views["b"], views["d"]))
    y.square().sum().backward()
    assert all(torch.isfinite(view).all() for view in views.values())
    assert all(view[1].count_nonzero() == 0 for view in views.values())  # the task without sentences
