# SPDX-License-Identifier: Apache-2.0
"""The C++ attention over many random batches against fp64, also under tests/sanitize.sh.

Its backward once wrote past its scratch memory for some lengths of sentence (found by AddressSanitizer in a training
run that had died of a corrupted heap); lengths are therefore drawn, not chosen.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from minbert_fast.ops import reference
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.native import layers

HEAD_DIMS = (16, 24, 32, 48, 64, 100, 128)
LONGEST = (1, 3, 17, 33, 48, 65, 130)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(24))
def test_random_batches_against_fp64(case: int, dtype: torch.dtype) -> None:
    draw = random.Random(case)
    torch.manual_seed(case)
    heads, width, longest = draw.choice((1, 2, 3)), draw.choice(HEAD_DIMS), draw.choice(LONGEST)
    lengths = [draw.randint(0, longest) for _ in range(draw.randint(1, 6))]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    rows, tail = int(offsets[-1]), draw.randint(0, 3)
    p, scale, seed = draw.choice((0.0, 0.2)), width**-0.5, torch.tensor([case])
    qkv = torch.randn(rows + tail, 3, heads, width).to(dtype)
    cotangent = torch.randn(rows + tail, heads * width).to(dtype)

    out, lse = layers.attention_forward(qkv, offsets, scale, p, seed, 5)
    dqkv = layers.attention_backward(cotangent, qkv, lse, offsets, scale, p, seed, 5)

    keep = None
    if p:
        spans = [torch.arange(int(a), int(b)) for a, b in itertools.pairwise(offsets)]
        keep = [
            torch.stack([keep_mask(seed, 5, span, len(span), p, head) for head in range(heads)]).double()
            for span in spans
        ]
    exact = qkv.double().requires_grad_()
    expected, expected_lse = reference.attention(exact, offsets.tolist(), scale, keep)
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double(), expected.detach(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse.detach(), atol=tolerance, rtol=tolerance)
    if rows:
        expected.backward(cotangent.double())
        assert exact.grad is not None
        torch.testing.assert_close(dqkv.double(), exact.grad, atol=2 * tolerance, rtol=2 * tolerance)
    assert (dqkv[rows:] == 0).all()
