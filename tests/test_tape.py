# SPDX-License-Identifier: Apache-2.0
"""The step that notes parameter gradients and computes them in a few launches, as on a GPU: the same J, G and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops.backend import force, triton_available
from minbert_fast.step import tape
from minbert_fast.step.one_pass import OnePassStep
from tests.test_step import make_batch, make_model, recipe
from tests.tolerance import poisoned_memory

pytestmark = [
    pytest.mark.skipif(not triton_available(), reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests the GPU's code in the interpreter"),
]

SIZES = {"sentiment": 3, "paraphrase": 2, "similarity": 1}
DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0}


class Steps:
    """Two steps of one model with one batch, one by Triton's kernels, and what they leave behind."""

    def __init__(self, chosen: Any, sizes: Mapping[str, int], backend: str) -> None:
        model = make_model(chosen)
        batch = make_batch(model, sizes, token_capacity=160, sentence_capacity=10)
        with force(backend), poisoned_memory():  # type: ignore[arg-type]
            self.step = OnePassStep(model, chosen, torch.float32)
            results = [self.step(batch, 1.0) for _ in range(2)]
        self.J = self.step.gradients.J.clone()
        self.words = self.step._word_rows(batch).clone()
        self.weights = self.step.flat.data.clone()
        self.losses: list[Tensor] = [result.losses for result in results]
        self.norms = [result.grad_norm for result in results]
        self.grams = [result.gram for result in results]


@pytest.mark.parametrize("surgery", ["pcgrad", "none"])
def test_two_steps_equal_those_of_the_cpu(surgery: str) -> None:
    chosen = recipe(surgery={"method": surgery})
    sizes = SIZES | {"paraphrase": 0}
    ours, expected, again = (Steps(chosen, sizes, name) for name in ("triton", "native", "triton"))
    assert ours.step.tape is not None
    assert expected.step.tape is None
    torch.testing.assert_close(ours.J, expected.J, atol=1e-6, rtol=2e-4)
    torch.testing.assert_close(ours.words, expected.words, atol=1e-6, rtol=2e-4)
    torch.testing.assert_close(ours.norms, expected.norms, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.losses, expected.losses, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours.weights, expected.weights, atol=1e-5, rtol=1e-3)
    if surgery == "pcgrad":
        torch.testing.assert_close(ours.grams, expected.grams, atol=1e-6, rtol=1e-4)
        exact = ours.J.double() @ ours.J.double().T + ours.words.double().flatten(1) @ ours.words.double().flatten(1).T
        torch.testing.assert_close(ours.grams[1].double(), exact, atol=1e-7, rtol=1e-5)
        assert not ours.J[1].any()
    for name in ("J", "words", "weights"):
        assert torch.equal(getattr(ours, name), getattr(again, name)), f"{name}: two runs differ"


def test_a_tape_that_is_full_computes_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(surgery={"method": "pcgrad"})
    whole = Steps(chosen, SIZES, "triton")
    monkeypatch.setattr(tape, "KEPT_BYTES", 40_000)
    launched: list[int] = []
    compute = ops.grouped.weight_gradients

    def counted(products: Any, *rest: Any, **keywords: Any) -> None:
        launched.append(len(products))
        compute(products, *rest, **keywords)

    monkeypatch.setattr(ops.grouped, "weight_gradients", counted)
    parts = Steps(chosen, SIZES, "triton")
    assert len(launched) > 4
    assert sum(launched) == 2 * 8  # two steps of two layers with four products each
    assert torch.equal(parts.J, whole.J)
    torch.testing.assert_close(parts.grams, whole.grams, atol=1e-7, rtol=1e-5)


def test_frozen_weights_are_not_noted() -> None:
    chosen = recipe(surgery={"method": "pcgrad"})
    model = make_model(chosen)
    layer = model.encoder.bert_layers[0]
    for p in (layer.out_dense.weight, layer.self_attention.key.bias, layer.interm_dense.bias):
        p.requires_grad_(False)
    batch = make_batch(model, SIZES)
    with force("triton"):
        step = OnePassStep(model, chosen, torch.float32)
        result = step(batch, 1.0)
    assert result.gram is not None
    words = step._word_rows(batch).double().flatten(1)
    exact = step.gradients.J.double() @ step.gradients.J.double().T + words @ words.T
    torch.testing.assert_close(result.gram.double(), exact, atol=1e-7, rtol=1e-5)
