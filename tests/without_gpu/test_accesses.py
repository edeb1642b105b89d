# SPDX-License-Identifier: Apache-2.0
"""The checker of tests/without_gpu/accesses.py speaks: small kernels with a fault each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast.ops.backend import triton_available

if not triton_available() or torch.cuda.is_available():
    pytest.skip("the checker is part of Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl

from minbert_fast.kernels.gram import gram_pieces
from tests.without_gpu.accesses import AccessError


@triton.jit
def _copy(x_ptr, y_ptr, size, apart, BLOCK: tl.constexpr):
    at = tl.program_id(0) * apart + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size), mask=at < size)


@triton.jit
def _reverse(x_ptr, BARRIER: tl.constexpr):
    at = tl.arange(0, 16)
    tl.store(x_ptr + at, at.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + at, tl.load(x_ptr + 15 - at))


@triton.jit
def _count(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


@triton.jit
def _hinted(x_ptr, offset):
    tl.store(x_ptr + tl.multiple_of(offset, 4), 1.0)


X = torch.arange(64.0)
J = torch.zeros(3, 32)


def copy(x: Tensor, y: Tensor, size: int = 40, apart: int = 16) -> Callable[[], Any]:
    return lambda: _copy[(3,)](x, y, size, apart, BLOCK=16)


def by_table(columns: int) -> None:
    piece, partials = torch.ones(2, 8), torch.empty(1, 2, 2)
    table = torch.tensor([[piece.data_ptr(), piece.stride(0), columns, 0]])
    gram_pieces([piece], table, 1, partials, add=False)
    assert torch.equal(partials[0], torch.full((2, 2), 8.0))


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "a read behind the end": (
        copy(X[:39], torch.zeros(64)),
        r"_copy: program \(2, 0, 0\) reads 4 bytes out of bounds: byte 156 of x_ptr \(float32 \[39\], strides \[1\]\)",
    ),
    "a read before the begin": (
        copy(X[48:], torch.zeros(64), apart=-16),
        r"program \(1, 0, 0\) reads .* byte -64 of x_ptr",
    ),
    "a write behind the end": (copy(X, torch.zeros(64)[:39]), r"program \(2, 0, 0\) writes .* byte 156 of y_ptr"),
    "a write into a gap": (copy(X, J[:, :20]), r"program \(1, 0, 0\) writes .* out of bounds: byte 80 of y_ptr"),
    "a row of a table too long": (lambda: by_table(9), "_gram_pieces: .* byte 64 of tensor 0 of the table"),
    "two programs write": (
        copy(X, torch.zeros(64), apart=15),
        r"\(1, 0, 0\) writes .* that program \(0, 0, 0\) writes",
    ),
    "a later program reads": (copy(J[0], J[0, 8:], 24), r"\(1, 0, 0\) reads .* that program \(0, 0, 0\) writes"),
    "an earlier program reads": (copy(J[0, 8:], J[0], 24), r"\(0, 0, 0\) reads .* that program \(1, 0, 0\) writes"),
    "no barrier": (lambda: _reverse[(1,)](J, BARRIER=False), "_reverse: .* wrote, without a barrier"),
    "an atomic": (lambda: _count[(1,)](J), "_count: an atomic"),
    "a hint that is false": (lambda: _hinted[(1,)](J, 6), "6.* is no multiple of 4"),
}


@pytest.mark.parametrize(("call", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(AccessError, match=message):
        call()


def test_without_a_fault_nothing_is_said() -> None:
    y = torch.zeros(64)
    copy(X, y)()
    assert torch.equal(y[:40], X[:40])
    copy(J[0], J[0], 32)()  # in place
    _reverse[(1,)](J, BARRIER=True)
    _hinted[(1,)](J, 8)
    by_table(8)
