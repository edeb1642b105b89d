# SPDX-License-Identifier: Apache-2.0
"""gram against fp64: every implementation, awkward shapes and strides, threads, broken gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert_fast import ops
from minbert_fast.ops import backend
from tests.surgery.oracles import random_rows
from tests.tolerance import assert_within_budget
from tests.without_gpu import cuda_on_cpu

# Edges of registers (4 to 16 lanes, up to 4 of them), of blocks (512, 1024) and of chunks (8192, 16384).
COLUMNS = [0, 1, 3, 17, 63, 65, 511, 512, 513, 1025, 8191, 8193, 16385, 40_001]
DTYPES = [torch.float32, torch.bfloat16]
TASKS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 31, 64]
# Tasks, columns, spare columns before them: groups of tasks and tails that Triton's and CUDA's kernels treat apart. 9,001
# and 2,500 columns are several rounds of the blocks of without_gpu/cuda_on_cpu; sums of nine tasks then move to double.
SHAPES = [
    (1, 0, 0),
    (1, 1, 0),
    (2, 1024, 8),
    (3, 9001, 3),
    (5, 1, 0),
    (8, 700, 3),
    (9, 2500, 8),
    (17, 129, 1),
]


def check_gram(J: Tensor) -> None:
    expected = J.double() @ J.double().T
    plain = J.float() @ J.float().T
    gram = ops.gram(J)
    assert torch.equal(gram, gram.T)
    assert_within_budget(gram, expected, plain, rows=max(J.shape[1], 1), name="gram")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_awkward_widths(isa: str, columns: int, dtype: torch.dtype) -> None:
    check_gram(random_rows(3, columns, dtype, spare=5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_numbers_of_tasks(isa: str, tasks: int, dtype: torch.dtype) -> None:
    check_gram(random_rows(tasks, 1203, dtype, spare=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tasks", "columns", "spare"),
    SHAPES,
)
def test_every_implementation(anywhere: torch.device, tasks: int, columns: int, spare: int, dtype: torch.dtype) -> None:
    """Twice the same bits, for every group of tasks and tail that Triton's and CUDA's kernels know."""
    J = random_rows(tasks, columns + spare, dtype).to(anywhere)[:, spare:]
    check_gram(J)
    assert torch.equal(ops.gram(J), ops.gram(J))


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_32_tasks(anywhere: torch.device, dtype: torch.dtype) -> None:
    if backend.surgery_implementation(torch.empty(0, device=anywhere)) == "triton" and anywhere.type == "cpu":
        pytest.skip("half a minute in Triton's interpreter")
    check_gram(random_rows(40, 200, dtype).to(anywhere))


@pytest.mark.parametrize("tasks", [2, 9])
def test_more_blocks_than_a_warp_has_lanes(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    J = random_rows(tasks, 40_000 if tasks == 2 else 2500)
    with cuda_on_cpu.running(cuda_on_cpu.NAME, J.device):
        monkeypatch.setattr(cuda_on_cpu.extension().processors, "value", 17)
        check_gram(J)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [300_007, 2**31 // 2 + 12_345])
def test_columns_beyond_32_bits_and_many_blocks(anywhere: torch.device, columns: int) -> None:
    J = torch.ones(2, columns, dtype=torch.bfloat16, device="cuda")
    assert ops.gram(J).flatten().tolist() == [float(torch.tensor(columns, dtype=torch.float32))] * 4


@pytest.mark.parametrize("columns", [0, 9, 5000])
def test_pieces_add_up(anywhere: torch.device, columns: int) -> None:
    J = random_rows(3, columns).to(anywhere)
    whole = torch.zeros(3, 3, device=anywhere)
    for piece in J.split([columns // 3, columns - columns // 3], dim=1):
        assert ops.gram(piece, whole, accumulate=True) is whole
    assert_within_budget(whole, J.double() @ J.double().T, J @ J.T, rows=max(columns, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(isa: str, threads: None, dtype: torch.dtype) -> None:
    J = random_rows(5, 100_003, dtype)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(ops.gram(J))
    assert all(torch.equal(gram, results[0]) for gram in results[1:])


def test_a_broken_gradient_stays_in_its_own_row_and_column(isa: str) -> None:
    broken_row(torch.device("cpu"))


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # Triton's interpreter, of infinity times 0
def test_a_broken_gradient_stays_in_its_own_row_and_column_everywhere(anywhere: torch.device) -> None:
    broken_row(anywhere)


def broken_row(anywhere: torch.device) -> None:
    J = random_rows(9, 700).to(anywhere)
    healthy = ops.gram(J)
    for bad in (torch.nan, torch.inf, -torch.inf):
        J[2, 333] = bad
        gram = ops.gram(J)
        others = [0, 1, *range(3, 9)]
        assert torch.equal(gram[others][:, others], healthy[others][:, others])
        assert not gram[2].isfinite().any()


@pytest.mark.parametrize("scale", [1e-18, 1e-10, 1e10, 1e17])
def test_scales(isa: str, scale: float) -> None:
    check_gram(random_rows(4, 2000) * scale)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_stride_and_offset(data: st.DataObject) -> None:
    tasks, columns = data.draw(st.integers(1, 64)), data.draw(st.integers(0, 700))
    dtype = data.draw(st.sampled_from(DTYPES))
    offset, spare = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    J = random_rows(tasks, offset + columns + spare, dtype, seed=data.draw(st.integers(0, 9)))
    J = J[:, offset : offset + columns]
    check_gram(J)


@pytest.mark.parametrize(
    ("J", "message"),
    [
        (torch.zeros(65, 4), "1 to 64 tasks, not 65"),
        (torch.zeros(0, 4), "1 to 64 tasks, not 0"),
        (torch.zeros(4), r"J must have shape \[any, any\], not \[4\]"),
        (torch.zeros(2, 4, dtype=torch.float64), "float32 or bfloat16, not float64"),
        (torch.zeros(2, 4, dtype=torch.float16), "not float16"),
        (torch.zeros(2, 4, dtype=torch.int32), "not int32"),
        (torch.zeros(4, 2).T, "each row of J must be contiguous"),
        (torch.zeros(2, 8)[:, ::2], "each row of J must be contiguous"),
        (torch.zeros(1, 4).expand(3, 4), "must not overlap"),
        (torch.zeros(9).as_strided((2, 4), (3, 1)), "must not overlap"),
        (torch.zeros(2, 4).to_sparse(), "dense"),
    ],
)
def test_gram_refuses(J: Tensor, message: str, anywhere: torch.device) -> None:
    out = torch.zeros(J.shape[0], J.shape[0], device=anywhere)
    with pytest.raises(ValueError, match=message):
        ops.gram(J.to(anywhere) if J.is_sparse or J.is_contiguous() else J, out)


def test_refusals_of_outputs(anywhere: torch.device) -> None:
    J = torch.zeros(3, 40, device=anywhere)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=anywhere)

    with pytest.raises(ValueError, match="only accumulate into a given out"):
        ops.gram(J, accumulate=True)
    for out, message in [
        (zeros(3, 4), r"out must have shape \[3, 3\]"),
        (zeros(3, 3, dtype=torch.bfloat16), "out must be float32"),
        (zeros(3, 6)[:, ::2], "out must be contiguous"),
        (J[0, 20:29].view(3, 3), "J and out must not share memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.gram(J, out)
