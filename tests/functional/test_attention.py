# SPDX-License-Identifier: Apache-2.0
"""attention and attention_dense under autograd: gradcheck, the three implementations, opcheck, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops import backend
from minbert_fast.ops import reference as plain
from minbert_fast.ops.dropout import keep_mask
from tests.tolerance import offsets

LENGTHS, TAIL, HEADS, WIDTH, SCALE, SITE = (5, 0, 7, 1), 2, 2, 8, 0.3, 4
SEED = torch.tensor([2**50 + 3])
MASK = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


def packed_rows(dtype: torch.dtype) -> Tensor:
    rows = sum(LENGTHS) + TAIL
    return torch.randn(rows, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def rectangle(dtype: torch.dtype) -> Tensor:
    return torch.randn(*MASK.shape, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def packed(qkv: Tensor, p: float = 0.0) -> Tensor:
    return ops.attention(qkv, offsets(LENGTHS), 9, SCALE, p, SEED, SITE)


def dense(qkv: Tensor, p: float = 0.0) -> Tensor:
    return ops.attention_dense(qkv, MASK, SCALE, p, SEED, SITE)


OPS = {"packed": (packed_rows, packed), "dense": (rectangle, dense)}


def keeps(rows: Tensor, columns: int, p: float) -> Tensor:
    """The dropout factors [h, rows, columns] of rows with these numbers."""
    return torch.stack([keep_mask(SEED, SITE, rows, columns, p, plane=head) for head in range(HEADS)]).double()


def test_packed_is_the_reference_with_the_stream_of_its_row_numbers() -> None:
    qkv, bounds = packed_rows(torch.float64), offsets(LENGTHS).tolist()
    keep = [keeps(torch.arange(begin, begin + n), n, 0.4) for begin, n in zip(bounds, LENGTHS, strict=False)]
    torch.testing.assert_close(packed(qkv, 0.4), plain.attention(qkv, bounds, SCALE, keep)[0])


def test_dense_is_the_reference_with_the_stream_of_its_row_numbers() -> None:
    qkv, (batch, length) = rectangle(torch.float64), MASK.shape
    keep = keeps(torch.arange(batch * length), length, 0.4).unflatten(1, (batch, length)).transpose(0, 1)
    torch.testing.assert_close(dense(qkv, 0.4), plain.attention_dense(qkv, MASK, SCALE, keep))


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gradcheck(kind: str, p: float) -> None:
    make, call = OPS[kind]
    assert torch.autograd.gradcheck(lambda qkv: call(qkv, p), [make(torch.float64).requires_grad_()], fast_mode=True)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("choice", ["triton", "native"])
def test_implementations_agree(kind: str, p: float, choice: Any) -> None:
    """Same inputs and seed, same mask, same output and gradient."""
    make, call = OPS[kind]

    def run(implementation: Any) -> tuple[Tensor, Tensor]:
        with backend.force(implementation):
            qkv = make(torch.float32).requires_grad_()
            out = call(qkv, p)
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            return out, torch.autograd.grad(out, qkv, cotangent)[0]

    for a, b in zip(run(choice), run("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("choice", ["triton", "native", "torch"])
@pytest.mark.parametrize("kind", OPS)
def test_expanded_cotangent_and_strided_input(kind: str, choice: Any) -> None:
    """What `.sum()` and a transpose hand to an op: a gradient of stride 0, an input that is not contiguous."""
    make, call = OPS[kind]
    qkv = make(torch.float32)
    strided = qkv.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
    whole = qkv.clone().requires_grad_()
    with backend.force(choice):
        got = torch.autograd.grad(call(strided).sum(), strided)[0]
        wanted = torch.autograd.grad(call(whole), whole, torch.ones_like(call(whole)))[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", OPS)
def test_opcheck(kind: str) -> None:
    """Schemas tell the truth about mutation and aliasing, fakes about shapes, and autograd is registered."""
    ops, make = torch.ops.minbert_fast, OPS[kind][0]
    qkv = make(torch.float32)
    if kind == "packed":
        where: tuple[Any, ...] = (offsets(LENGTHS), 9)
        forward, backward = ops.attention.default, ops.attention_backward.default
    else:
        where = (MASK,)
        forward, backward = ops.attention_dense.default, ops.attention_dense_backward.default
    rest = (*where, SCALE, 0.25, SEED, SITE)
    out, lse = forward(qkv, *rest)
    torch.library.opcheck(forward, (qkv.clone().requires_grad_(), *rest))
    torch.library.opcheck(backward, (torch.randn_like(out), qkv, out, lse, *rest))


@pytest.mark.parametrize("choice", ["native", "torch"])
def test_nothing_to_attend_to(choice: Any) -> None:
    with backend.force(choice):
        for rows, lengths in ((3, ()), (0, (0, 0)), (2, (0,))):
            qkv = torch.randn(rows, 3, HEADS, WIDTH, requires_grad=True)
            out = ops.attention(qkv, offsets(lengths), 0, SCALE)
            assert out.shape == (rows, HEADS * WIDTH)
            assert not out.any()
            assert not torch.autograd.grad(out, qkv, torch.ones_like(out))[0].any()


def test_refusals_name_what_is_wrong() -> None:
    qkv, cu_seqlens = packed_rows(torch.float32), offsets(LENGTHS)
    with pytest.raises(ValueError, match=r"qkv must have shape \[N, 3, heads, head_dim\]"):
        ops.attention(qkv[:, :2], cu_seqlens, 9, SCALE)
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32"):
        ops.attention(qkv, cu_seqlens.long(), 9, SCALE)
    with pytest.raises(ValueError, match=r"mask must have shape \[3, 5\]"):
        ops.attention_dense(rectangle(torch.float32), MASK[:2], SCALE)
    for p, seed in ((1.0, SEED), (-0.5, SEED), (0.1, None)):
        with pytest.raises(ValueError, match="dropout needs"):
            ops.attention(qkv, cu_seqlens, 9, SCALE, p, seed)
