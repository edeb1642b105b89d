# SPDX-License-Identifier: Apache-2.0
"""Pooling against a loop over sentences, values and gradients, with every awkward sentence."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from minbert_fast.ops.backend import force
from minbert_fast.ops.pooling import Mode, pool, pooling_backward, pooling_forward
from tests.ops.common import DTYPES, int32, random
from tests.tolerance import AWKWARD_LENGTHS, offsets, reference


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


@pytest.mark.parametrize(
    ("lengths", "width"), [((0, 70, 32, 1), 130), *((lengths, 5) for lengths in AWKWARD_LENGTHS.values())]
)
@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_error_budget(
    mode: Mode, lengths: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Two rows before the first sentence and three behind the last belong to nobody."""
    generator = torch.Generator().manual_seed(0)
    ends = [2 + n for n in offsets(lengths).tolist()]
    hidden = random(ends[-1] + 3, width, dtype=dtype, device=device, generator=generator).requires_grad_()
    cotangent = random(len(lengths), width, dtype=torch.float32, device=device, generator=generator)
    pooled = pool(hidden, int32(*ends, device=device), mode)
    pooled.backward(cotangent)
    assert pooled.dtype == torch.float32
    assert hidden.grad is not None

    def formula(hidden: Tensor) -> Tensor:
        return naive(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), ends, mode)

    reference(formula, {"hidden": hidden.detach()}, [cotangent]).check([pooled, hidden.grad])
    assert not hidden.grad[: ends[0]].any()
    assert not hidden.grad[ends[-1] :].any()


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_fp64(mode: Mode) -> None:
    hidden = torch.randn(13, 5, dtype=torch.float64)
    pooled = pool(hidden, int32(2, 3, 6, 6, 10, 10), mode)
    torch.testing.assert_close(pooled, naive(hidden, [2, 3, 6, 6, 10, 10], mode))


def test_of_equal_maxima_the_first_row_gets_the_gradient(device: torch.device) -> None:
    hidden = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 2.0]], device=device, requires_grad=True)
    pool(hidden, int32(0, 3, device=device), "max").backward(torch.tensor([[3.0, 5.0]], device=device))
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[3.0, 0.0], [0.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("place", [0, 1, 39])
def test_a_value_that_is_not_finite_is_not_lost(mode: Mode, place: int, device: torch.device) -> None:
    hidden = torch.zeros(40, 3, device=device)
    hidden[place, 1] = torch.nan
    finite = pool(hidden, int32(0, 40, device=device), mode).isfinite()
    assert finite.tolist() == [[True, mode == "cls" and place > 0, True]]


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize(("rows", "ends"), [(0, [0]), (4, [0]), (0, [0, 0, 0]), (4, [4, 4])])
def test_nothing_to_pool_gives_zeros_and_no_gradient(
    mode: Mode, rows: int, ends: list[int], device: torch.device
) -> None:
    hidden = torch.randn(rows, 3, device=device, requires_grad=True)
    pooled = pool(hidden, int32(*ends, device=device), mode)
    assert pooled.shape == (len(ends) - 1, 3)
    assert not pooled.any()
    pooled.backward(torch.randn_like(pooled))
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_opcheck(mode: Mode) -> None:
    with force("triton"):
        hidden, ends = torch.randn(9, 4), int32(1, 3, 3, 8)
        torch.library.opcheck(pooling_forward.overload, (hidden, ends, mode))
        pooled, chosen = pooling_forward(hidden, ends, mode)
        torch.library.opcheck(pooling_backward.overload, (pooled, ends, chosen, mode, 9, torch.bfloat16))


def test_another_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="expected mean, cls or max"):
        pool(torch.zeros(1, 1), torch.tensor([0, 1], dtype=torch.int32), "median")  # type: ignore[arg-type]
