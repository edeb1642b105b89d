# SPDX-License-Identifier: Apache-2.0
"""combine against fp64: every implementation, awkward shapes and strides, threads, weights of zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert_fast import ops
from tests.ops.test_gram import COLUMNS, DTYPES, SHAPES, TASKS
from tests.surgery.oracles import random_rows
from tests.tolerance import assert_within_budget


def draw_weights(tasks: int) -> Tensor:
    return torch.randn(tasks, generator=torch.Generator().manual_seed(1))


def check_combine(J: Tensor, w: Tensor) -> None:
    out = J.new_full((J.shape[1] + 1,), torch.nan, dtype=torch.float32)[1:]  # off any alignment
    assert ops.combine(J, w, out) is out
    expected = w.double() @ J.double()
    assert_within_budget(out, expected, torch.mv(J.float().T, w), rows=len(J), name="combine")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_awkward_widths(isa: str, columns: int, dtype: torch.dtype) -> None:
    check_combine(random_rows(3, columns, dtype, spare=5), torch.tensor([0.3, -1.7, 1e-3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_numbers_of_tasks(isa: str, tasks: int, dtype: torch.dtype) -> None:
    check_combine(random_rows(tasks, 1203, dtype, spare=2), draw_weights(tasks))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tasks", "columns", "spare"), SHAPES)
def test_every_implementation(anywhere: torch.device, tasks: int, columns: int, spare: int, dtype: torch.dtype) -> None:
    """Twice the same bits, for every group of tasks and tail that Triton's and CUDA's kernels know."""
    J = random_rows(tasks, columns + spare, dtype).to(anywhere)[:, spare:]
    w = draw_weights(tasks).to(anywhere)
    check_combine(J, w)
    assert torch.equal(ops.combine(J, w), ops.combine(J, w))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [300_007, 2**31 // 2 + 12_345])
def test_columns_beyond_32_bits_and_many_blocks(anywhere: torch.device, columns: int) -> None:
    J = torch.ones(2, columns, dtype=torch.bfloat16, device="cuda")
    assert bool((ops.combine(J, torch.ones(2, device="cuda"))[-10:] == 2).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(isa: str, threads: None, dtype: torch.dtype) -> None:
    J, w = random_rows(5, 100_003, dtype), torch.rand(5)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(ops.combine(J, w))
    assert all(torch.equal(combined, results[0]) for combined in results[1:])


def test_large_results_are_written_past_the_cache_unharmed(isa: str) -> None:
    """Above 4M elements combine streams; a start off the register's alignment must not."""
    columns = (4 << 20) + 1000
    J, w = random_rows(2, columns + 1), torch.tensor([1.0, -0.5])
    room = torch.full((columns + 1,), torch.nan)
    for begin in (0, 1):
        out = room[begin : begin + columns]
        ops.combine(J[:, :columns], w, out)
        torch.testing.assert_close(out, J[0, :columns] - 0.5 * J[1, :columns])


def test_weight_zero_hides_a_broken_row(anywhere: torch.device) -> None:
    J = torch.ones(3, 100, device=anywhere)
    J[1, 5] = torch.nan
    J[1, 6] = torch.inf
    weights = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1e-30, 2.0]], device=anywhere)
    assert bool((ops.combine(J, weights[0]) == 3).all())
    assert not ops.combine(J, weights[1])[5:7].isfinite().any()


@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e10, 1e17])
def test_scales(isa: str, scale: float) -> None:
    check_combine(random_rows(4, 2000) * scale, torch.rand(4))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_stride_and_offset(data: st.DataObject) -> None:
    tasks, columns = data.draw(st.integers(1, 64)), data.draw(st.integers(0, 700))
    offset, spare = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    J = random_rows(
        tasks, offset + columns + spare, data.draw(st.sampled_from(DTYPES)), seed=data.draw(st.integers(0, 9))
    )
    check_combine(J[:, offset : offset + columns], torch.randn(tasks))


def test_refusals(anywhere: torch.device) -> None:
    J, w = torch.zeros(3, 40, device=anywhere), torch.zeros(3, device=anywhere)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=anywhere)

    for weight, out, message in [
        (zeros(4), zeros(40), r"w must have shape \[3\]"),
        (zeros(3, dtype=torch.float64), zeros(40), "w must be float32"),
        (w, zeros(39), r"out must have shape \[40\]"),
        (w, J[1], "must not share memory"),
        (J[1, :3], zeros(40), "must not share memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.combine(J, weight, out)
