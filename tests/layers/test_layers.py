# SPDX-License-Identifier: Apache-2.0
"""The encoder's CPU operations: every output and gradient against fp64 on every instruction set, masks, threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minbert_fast.ops import reference
from minbert_fast.ops.dropout import keep_mask
from minbert_fast.ops.native import layers
from tests.layers import cases
from tests.layers.cases import SEED, SITE, int32
from tests.tolerance import AWKWARD_BOUNDS, AWKWARD_LENGTHS, poisoned_memory
from tests.tolerance import reference as run_reference

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [3, 24, 100, 384]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def poisoned():
    """Outputs hold NaN until they are written."""
    with poisoned_memory():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("width", WIDTHS)
def test_add_norm(isa: str, width: int, p: float, dtype: torch.dtype) -> None:
    results, expected = cases.add_norm(40, width, AWKWARD_BOUNDS["three tasks"], p, dtype)
    expected.check(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 1536])
def test_bias_gelu(isa: str, width: int, dtype: torch.dtype) -> None:
    results, expected = cases.bias_gelu(40, width, AWKWARD_BOUNDS["three tasks"], dtype)
    expected.check(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("width", WIDTHS)
def test_embedding(isa: str, width: int, p: float, dtype: torch.dtype) -> None:
    results, expected = cases.embedding(40, width, AWKWARD_BOUNDS["three tasks"], p, dtype)
    expected.check(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", AWKWARD_BOUNDS.values(), ids=AWKWARD_BOUNDS)
def test_awkward_bounds(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    for results, expected in (
        cases.add_norm(40, 24, bounds, 0.1, dtype),
        cases.bias_gelu(40, 24, bounds, dtype),
        cases.embedding(40, 24, bounds, 0.1, dtype),
    ):
        expected.check(results)


def test_many_chunks_of_rows() -> None:
    """Enough rows that tasks begin within chunks, end within them, and share one with two others."""
    bounds = (0, 500, 503, 505, 2100, 2300)
    for results, expected in (
        cases.add_norm(2311, 33, bounds, 0.1, torch.float32),
        cases.bias_gelu(2311, 33, bounds, torch.float32),
        cases.embedding(2311, 33, bounds, 0.1, torch.float32),
    ):
        expected.check(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [16, 17, 32, 50, 64, 128])
def test_attention(isa: str, head_dim: int, p: float, dtype: torch.dtype) -> None:
    results, expected = cases.attention((5, 33, 1, 18, 0, 64), 3, 2, head_dim, p, dtype)
    expected.check(results)


NONEMPTY = {name: lengths for name, lengths in AWKWARD_LENGTHS.items() if sum(lengths)}  # else nothing to differentiate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", NONEMPTY.values(), ids=NONEMPTY)
def test_attention_awkward_lengths(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    results, expected = cases.attention(lengths, 4, 3, 20, 0.1, dtype)
    expected.check(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_long_sentences(isa: str, dtype: torch.dtype) -> None:
    """More rows than a block of queries: 65 leaves a short one, 157 an odd one."""
    results, expected = cases.attention((65, 157, 96), 0, 1, 32, 0.1, dtype)
    expected.check(results)


@pytest.mark.parametrize("lengths", [(64, 65), (65, 64), (130, 63)])
def test_a_sentence_of_one_block_beside_a_longer_one_keeps_to_its_scratch_memory(lengths: tuple[int, ...]) -> None:
    """Blocks of 64 queries are longer than the 48 of longer sentences, by which scratch was once measured."""
    results, expected = cases.attention(lengths, 0, 1, 64, 0.1, torch.float32)
    expected.check(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_attention_dense(isa: str, p: float, dtype: torch.dtype) -> None:
    """Padding on the left, on the right, in holes, everywhere, nowhere; dropout by places in the rectangle."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 0, 1], [0] * 6, [1] * 6])
    batch, length, heads, head_dim = 5, 6, 2, 20
    new = cases.draw(3, dtype)
    qkv, dout = new(batch, length, 3, heads, head_dim), new(batch, length, heads * head_dim)
    places = torch.arange(batch * length)
    keep = torch.stack([keep_mask(SEED, SITE, places, length, p, head) for head in range(heads)])
    expected = run_reference(
        lambda qkv, keep: reference.attention_dense(qkv, mask, 0.3, keep), {"qkv": qkv}, [dout],
        keep=keep.unflatten(1, (batch, length)).transpose(0, 1),
    )  # fmt: skip
    out, lse = layers.attention_dense_forward(qkv, mask, 0.3, p, SEED, SITE)
    expected.check([out, layers.attention_dense_backward(dout, qkv, lse, mask, 0.3, p, SEED, SITE)])
    assert not out[mask == 0].any()


def test_attention_with_strided_rows_and_a_negative_scale() -> None:
    wide, offsets = cases.draw(0, torch.float32)(30, 4, 2, 24), [0, 20, 30]
    qkv, dout = wide[:, :3], cases.draw(1, torch.float32)(30, 60)[:, :48]
    expected = run_reference(lambda qkv: reference.attention(qkv, offsets, -3.0), {"qkv": qkv}, [dout, None])
    out, lse = layers.attention_forward(qkv, int32(*offsets), -3.0)
    expected.check([out, lse, layers.attention_backward(dout, qkv, lse, int32(*offsets), -3.0)])


def test_attention_scores_too_large_for_a_naive_softmax() -> None:
    qkv = torch.full((4, 3, 1, 16), 40.0)
    qkv[1, 1] = -40.0  # this key's weight is e^-51200
    out, lse = layers.attention_forward(qkv, int32(0, 4), 1.0)
    torch.testing.assert_close(out, torch.full((4, 16), 40.0))
    assert torch.isfinite(lse).all()


# ---- Dropout ------------------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_pytorch_path_bit_for_bit(isa: str) -> None:
    rows, width, p = 19, 100, 0.3
    keep = keep_mask(SEED, SITE, torch.arange(rows), width, p)
    zeros = torch.zeros(rows, dtype=torch.int32)
    table, nothing, one = torch.zeros(1, width), torch.zeros(width), torch.ones(width)
    y, _, _ = layers.embedding_forward(zeros, zeros, zeros, table, table, table, nothing, one, 1e-5, p, SEED, SITE)
    assert torch.equal(y, keep)
    x = cases.draw(0, torch.float32)(rows, width)
    _, mean, rstd = layers.add_norm_forward(x, one, x, one, one, 1e-5, p, SEED, SITE)
    dx, dresidual = layers.add_norm_backward(x.flip(0), x, one, x, one, mean, rstd, int32(0, rows), p, SEED, SITE)
    assert torch.equal(dx, dresidual * keep)


def test_attention_masks_are_those_of_the_pytorch_path_bit_for_bit(isa: str) -> None:
    """Equal scores and values that count keys: row i of the output is its mask over the number of keys."""
    lengths, heads, width = (8, 64, 16), 2, 64
    begin = 0
    offsets = int32(0, 8, 72, 88)
    qkv = torch.zeros(88, 3, heads, width)
    for n in lengths:
        qkv[begin : begin + n, 2] = torch.eye(n, width)[:, None]
        begin += n
    out, _ = layers.attention_forward(qkv, offsets, 1.0, 0.5, SEED, SITE)
    for keep, n, first in zip(cases.attention_keep(lengths, heads, 0.5), lengths, (0, 8, 72), strict=True):
        got = out[first : first + n].unflatten(1, (heads, width)).transpose(0, 1)[..., :n]
        assert torch.equal(got * n, keep)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_seeds_at_the_ends_of_their_range(seed: int) -> None:
    key = torch.tensor([seed])
    zeros = torch.zeros(3, dtype=torch.int32)
    table, nothing, one = torch.zeros(1, 8), torch.zeros(8), torch.ones(8)
    y, _, _ = layers.embedding_forward(zeros, zeros, zeros, table, table, table, nothing, one, 1e-5, 0.5, key, 0)
    assert torch.equal(y, keep_mask(key, 0, torch.arange(3), 8, 0.5))


# ---- Determinism, memory, dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, threads: None) -> None:
    bounds = (0, 100, 100, 260, 300)

    def results() -> list[Tensor]:
        return [
            *cases.add_norm(311, 40, bounds, 0.1, dtype)[0],
            *cases.bias_gelu(311, 40, bounds, dtype)[0],
            *cases.embedding(311, 40, bounds, 0.1, dtype)[0],
            *cases.attention((70, 3, 41, 0, 12), 2, 3, 24, 0.1, dtype)[0],
        ]

    torch.set_num_threads(1)
    alone = results()
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        for one, many in zip(alone, results(), strict=True):
            assert torch.equal(one, many)


def test_gradients_of_bf16_activations_into_fp32_are_summed_in_fp32() -> None:
    new, bounds = cases.draw(0, torch.bfloat16), int32(0, 700, 1000)
    dy = new(1000, 30)
    wide, narrow = torch.full((2, 40), torch.nan)[:, :30], torch.empty(2, 30, dtype=torch.bfloat16)
    layers.column_sums(dy, bounds, wide)
    layers.column_sums(dy, bounds, narrow)
    exact = torch.stack([dy[:700].double().sum(0), dy[700:].double().sum(0)])
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-4)
    assert torch.equal(wide.bfloat16(), narrow)


def test_column_sums_of_strided_rows(isa: str) -> None:
    x = cases.draw(0, torch.float32)(50, 90)[:, :70]
    out = torch.full((3, 70), torch.nan)
    layers.column_sums(x, int32(0, 20, 20, 47), out)
    torch.testing.assert_close(out, torch.stack([x[:20].sum(0), torch.zeros(70), x[20:47].sum(0)]))


def test_fp32_parameters_with_bf16_activations() -> None:
    new = cases.draw(0, torch.bfloat16)
    x, residual, (bias, gamma, beta) = new(9, 40), new(9, 40), torch.randn(3, 40)
    y, _, _ = layers.add_norm_forward(x, bias, residual, gamma, beta, 1e-12)
    exact = reference.add_norm(*(t.double() for t in (x, bias, residual, gamma, beta)), 1e-12)
    torch.testing.assert_close(y, exact.bfloat16())
    assert layers.bias_gelu_forward(x, bias).dtype == torch.bfloat16


def test_nothing_is_written_outside_a_slice_of_j() -> None:
    J = torch.full((2, 100), torch.nan)
    layers.column_sums(torch.randn(20, 30), int32(0, 12, 20), J[:, 40:70])
    assert torch.isfinite(J[:, 40:70]).all()
    assert J[:, :40].isnan().all()
    assert J[:, 70:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(poison: float, dtype: torch.dtype) -> None:
    new, offsets = cases.draw(0, dtype), int32(0, 4, 9)
    x, one = new(9, 40), torch.ones(40)
    x[2, 3] = poison
    y, _, _ = layers.add_norm_forward(x, one, new(9, 40), one, one, 1e-12)
    assert y[2].isnan().all()
    assert torch.isfinite(y[3:]).all()
    assert not torch.isfinite(layers.bias_gelu_forward(x, one)[2, 3])
    qkv = new(9, 3, 2, 20)
    qkv[2, 0, 0, 5] = poison
    out, _ = layers.attention_forward(qkv, offsets, 0.3)
    assert out[2, :20].isnan().all()
    assert torch.isfinite(out[3:]).all()


@pytest.mark.parametrize("call", [
    lambda z: layers.add_norm_forward(z.new_empty(0, 8), torch.ones(8), z.new_empty(0, 8), *torch.ones(2, 8), 1e-5),
    lambda z: layers.bias_gelu_forward(z.new_empty(0, 8), torch.ones(8)),
    lambda z: layers.bias_gelu_forward(z.new_empty(3, 0), torch.ones(0)),
    lambda z: layers.attention_forward(z.new_empty(0, 3, 2, 8), int32(0, 0), 1.0),
])  # fmt: skip
def test_no_rows_at_all(call: Callable[[Tensor], object]) -> None:
    call(torch.zeros(1))
