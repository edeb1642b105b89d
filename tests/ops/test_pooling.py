# SPDX-License-Identifier: Apache-2.0
"""Pooling against a loop over sentences, values and gradients, with every awkward sentence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from minbert_fast.ops.pooling import pool

# First sentence begins at row 2; lengths 1, 3, 0, 4, 0; three rows of padding behind them.
OFFSETS = [2, 3, 6, 6, 10, 10]
ROWS = 13


def naive(hidden: Tensor, offsets: list[int], mode: str) -> Tensor:
    pooled = []
    for begin, end in itertools.pairwise(offsets):
        rows = hidden[begin:end]
        if begin == end:
            pooled.append(hidden.new_zeros(hidden.shape[1]))
        elif mode == "mean":
            pooled.append(rows.sum(0) / (end - begin))
        elif mode == "cls":
            pooled.append(rows[0])
        else:
            pooled.append(rows.max(0).values)
    return torch.stack(pooled)


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pool_equals_a_loop_over_sentences(mode, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    expected_input = hidden.detach().double().requires_grad_()
    cotangent = torch.randn(5, 5, generator=generator, dtype=torch.float64)

    pooled = pool(hidden, torch.tensor(OFFSETS, dtype=torch.int32), mode)
    expected = naive(expected_input, OFFSETS, mode)
    pooled.backward(cotangent.to(pooled.dtype))
    expected.backward(cotangent)

    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6  # the gradient is rounded to the input's dtype
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), expected_input.grad, rtol=tolerance, atol=tolerance)
    outside = torch.ones(ROWS, dtype=torch.bool)
    outside[OFFSETS[0] : OFFSETS[-1]] = False
    assert not hidden.grad[outside].any()


def test_of_equal_maxima_the_first_row_gets_the_gradient():
    hidden = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 2.0]], requires_grad=True)
    pool(hidden, torch.tensor([0, 3], dtype=torch.int32), "max").backward(torch.tensor([[3.0, 5.0]]))
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[3.0, 0.0], [0.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize(("rows", "offsets"), [(0, [0]), (4, [0]), (0, [0, 0, 0]), (4, [4, 4])])
def test_nothing_to_pool_gives_zeros_and_no_gradient(mode, rows, offsets):
    hidden = torch.randn(rows, 3, requires_grad=True)
    pooled = pool(hidden, torch.tensor(offsets, dtype=torch.int32), mode)
    assert pooled.shape == (len(offsets) - 1, 3)
    assert not pooled.any()
    pooled.backward(torch.randn_like(pooled))
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match="expected mean, cls or max"):
        pool(torch.zeros(1, 1), torch.tensor([0, 1], dtype=torch.int32), "median")  # type: ignore[arg-type]
