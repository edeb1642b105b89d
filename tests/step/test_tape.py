# SPDX-License-Identifier: Apache-2.0
"""The step that notes parameter gradients and computes them in a few launches, as on a GPU: the same J, G and weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from minbert_fast import BertModel
from minbert_fast.ops.backend import force, triton_available
from minbert_fast.ops.grouped import Product, Tables
from minbert_fast.step import tape
from minbert_fast.step.flat import FlatParameters, ParameterSpec, StageParameters, TaskGradients
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.step.stepping import StepResult
from minbert_fast.step.tape import Tape
from minbert_fast.tasks import MultitaskModel, build_tasks
from tests.step.test_step import CONFIG, make_batch, recipe
from tests.tolerance import poisoned_memory

pytestmark = [
    pytest.mark.skipif(not triton_available(), reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests the GPU's code in the interpreter"),
]

SIZES = {"sentiment": 1, "paraphrase": 0, "similarity": 1}


def one_step(surgery: str, backend: str) -> tuple[OnePassStep, StepResult, Tensor]:
    """A step of a model with one layer by one implementation, its result, and the words' gradients."""
    chosen = recipe(surgery={"method": surgery})
    torch.manual_seed(0)
    model = MultitaskModel(BertModel(replace(CONFIG, num_hidden_layers=1)), build_tasks(chosen), "mean")
    batch = make_batch(model, SIZES, lowest_word=57, longest=8, token_capacity=20)
    with force(backend), poisoned_memory():  # type: ignore[arg-type]
        step = OnePassStep(model, chosen, torch.float32)
        result = step(batch, 1.0)
    return step, result, step._word_rows(batch).double().flatten(1)


@pytest.mark.parametrize("surgery", ["pcgrad", pytest.param("none", marks=pytest.mark.ci)])
def test_a_step_equals_that_of_the_cpu(surgery: str) -> None:
    (ours, one, words), (theirs, other, their_words) = (one_step(surgery, name) for name in ("triton", "native"))
    assert ours.tape is not None
    assert theirs.tape is None
    torch.testing.assert_close(ours.gradients.J, theirs.gradients.J, atol=1e-6, rtol=2e-4)
    torch.testing.assert_close(words, their_words, atol=1e-6, rtol=2e-4)
    torch.testing.assert_close(one.losses, other.losses, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(one.grad_norm, other.grad_norm, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.flat.data, theirs.flat.data, atol=1e-5, rtol=1e-3)
    if surgery == "pcgrad":
        assert one.gram is not None
        J = ours.gradients.J.double()
        torch.testing.assert_close(one.gram.double(), J @ J.T + words @ words.T, atol=1e-7, rtol=1e-5)
        assert not ours.gradients.J[1].any()


class Recorded:
    """Gradients J [2, P] of two weights and two biases, and a tape for them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
        modules = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 64)])
        specs = [ParameterSpec(name, p) for name, p in modules.named_parameters()]
        self.gradients = TaskGradients(
            FlatParameters(StageParameters(specs, None, {}, []), torch.float32), 2, torch.float32
        )
        self.tape = Tape(self.gradients, self.bounds, Tables(), gram=True)
        self.products = []
        for module in modules:
            dy, x = (torch.randn(14, n, generator=generator) for n in module.weight.shape)
            views = [self.gradients.view(p) for p in (module.weight, module.bias)]
            self.products.append(Product(dy, x, *views))

    def expected(self, product: Product) -> Tensor:
        rows = [(product.dy[a:b].T @ product.x[a:b]) for a, b in ((0, 5), (5, 12))]
        return torch.stack(rows)


def test_a_tape_that_is_full_computes_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """J and G do not depend on how many launches there are."""
    found = []
    for kept in (1 << 30, 1):
        monkeypatch.setattr(tape, "KEPT_BYTES", kept)
        with force("triton"), poisoned_memory():
            made = Recorded()
            for product in made.products:
                made.tape.product(product)
            assert len(made.tape._computed) == (0 if kept > 1 else 2)
            made.tape.finish()
            gram = made.tape.gram(None)
        for product in made.products:
            assert product.dweight is not None
            torch.testing.assert_close(product.dweight, made.expected(product))
        J = made.gradients.J.double()
        torch.testing.assert_close(gram.double(), J @ J.T, atol=0, rtol=1e-5)
        found.append(made.gradients.J.clone())
    assert torch.equal(*found)


def test_a_frozen_weight_is_left_alone() -> None:
    with force("triton"):
        made = Recorded()
        first, second = made.products
        made.gradients.J.fill_(0.5)
        made.tape.product(first._replace(dweight=None, dbias=None))
        made.tape.product(second._replace(dbias=None))
        made.tape.finish()
        gram = made.tape.gram(None)
    assert first.dweight is not None
    assert (first.dweight == 0.5).all()
    J = made.gradients.J.double()
    torch.testing.assert_close(gram.double(), J @ J.T, atol=0, rtol=1e-5)


@pytest.mark.parametrize("surgery", ["pcgrad", "none"])
def test_a_frozen_encoder_has_a_gram_matrix_of_zeros(surgery: str) -> None:
    """Its J has no columns; a step on a GPU ended with an IndexError."""
    chosen = recipe(surgery={"method": surgery}, model={"freeze": True})
    torch.manual_seed(0)
    model = MultitaskModel(BertModel(replace(CONFIG, num_hidden_layers=0)), build_tasks(chosen), "mean")
    norms = []
    for backend in ("triton", "native"):
        with force(backend), poisoned_memory():  # type: ignore[arg-type]
            step = OnePassStep(copy.deepcopy(model), chosen, torch.float32)
            result = step(make_batch(model, SIZES, lowest_word=40), 1.0)
        assert result.gram is None or not result.gram.any()
        norms.append(result.grad_norm)
    torch.testing.assert_close(*norms, atol=1e-6, rtol=1e-4)


def test_a_tape_of_weights_that_fill_all_of_j() -> None:
    """Nothing is left to read for the Gram matrix: the launches of the weights have multiplied everything."""
    weight = nn.Linear(16, 32).weight
    flat = FlatParameters(StageParameters([ParameterSpec("weight", weight)], None, {}, []), torch.float32)
    gradients, bounds = TaskGradients(flat, 2, torch.float32), torch.tensor([0, 5, 12], dtype=torch.int32)
    with force("triton"), poisoned_memory():
        tape = Tape(gradients, bounds, Tables(), gram=True)
        tape.product(Product(torch.randn(14, 32), torch.randn(14, 16), gradients.view(weight), None))
        tape.finish()
        gram = tape.gram(None)
    torch.testing.assert_close(gram, gradients.J @ gradients.J.T, atol=0, rtol=1e-5)
