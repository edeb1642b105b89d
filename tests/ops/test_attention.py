# SPDX-License-Identifier: Apache-2.0
"""attention on every floor against the reference in fp64: packed and dense, short and long, with and without dropout.

The extension's backward once wrote past its scratch memory for some lengths of sentence (found by AddressSanitizer in a
training run that had died of a corrupted heap); lengths are therefore drawn, too (`test_random_batches`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minbert_fast import ops
from minbert_fast.ops import backend
from minbert_fast.ops.attention import attention_backward, attention_forward, reference
from minbert_fast.ops.dropout import keep_mask
from tests import tolerance
from tests.ops.common import DTYPES, P, int32
from tests.tolerance import AWKWARD_LENGTHS, offsets

SITE = 5


def rows_of(lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype, device: torch.device, tail: int = 3):
    """Random qkv [N, 3, h, d] and dout [N, h * d]; `tail` rows belong to no sentence."""
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * width)
    rows = sum(lengths) + tail
    qkv = torch.randn(rows, 3, heads, width, generator=generator)
    dout = torch.randn(rows, heads * width, generator=generator)
    return qkv.to(device, dtype), dout.to(device, dtype)


def seed_on(device: torch.device) -> Tensor:
    return torch.tensor([2**40 + 11], device=device)


def run(
    qkv: Tensor,
    dout: Tensor,
    lengths: Sequence[int],
    p: float = 0.0,
    bound: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out, dqkv."""
    qkv = qkv.detach().requires_grad_()
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    longest = max(lengths) if bound is None else bound
    out = ops.attention(qkv, offsets(lengths, qkv.device), longest, scale, p, seed_on(qkv.device), SITE)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def keeps(rows: Tensor, keys: int, heads: int, p: float) -> Tensor:
    """The dropout factors [h, rows, keys] of query rows with these numbers."""
    return torch.stack([keep_mask(seed_on(rows.device), SITE, rows, keys, p, head) for head in range(heads)])


def packed_reference(qkv: Tensor, lengths: Sequence[int], scale: float, keep: Sequence[Tensor] | None) -> Tensor:
    """The formula, one sentence at a time."""
    out = qkv.new_zeros(len(qkv), qkv.shape[2] * qkv.shape[3])
    for sentence, (begin, end) in enumerate(itertools.pairwise(offsets(lengths).tolist())):
        whole = torch.ones(1, end - begin, dtype=torch.bool, device=qkv.device)
        factors = 1.0 if keep is None else keep[sentence][None]
        if begin < end:
            out[begin:end] = reference(qkv[None, begin:end], whole, scale, factors)[0][0]
    return out


def check(
    qkv: Tensor,
    dout: Tensor,
    lengths: Sequence[int],
    p: float = 0.0,
    bound: int | None = None,
    scale: float | None = None,
) -> None:
    """Holds output and gradient to the error budget, dropout by the mask of the documented stream."""
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    out, dqkv = run(qkv, dout, lengths, p, bound, scale)
    spans = [torch.arange(a, b, device=qkv.device) for a, b in itertools.pairwise(offsets(lengths).tolist())]
    keep = [keeps(span, len(span), qkv.shape[2], p) for span in spans] if p else None
    formula = tolerance.reference(packed_reference, {"qkv": qkv}, [dout], lengths=lengths, scale=scale, keep=keep)
    formula.check([out, dqkv])
    end = sum(lengths)
    assert not out[end:].any()
    assert not dqkv[end:].any()


def test_the_reference_is_torchs_own_attention() -> None:
    qkv, _ = rows_of((7,), 2, 8, torch.float64, torch.device("cpu"), tail=0)
    q, k, v = (t.transpose(0, 1) for t in qkv.unbind(1))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(0, 1).flatten(1)
    out, lse = reference(qkv[None], torch.ones(1, 7, dtype=torch.bool), 0.3)
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(lse[0], (q @ k.transpose(1, 2) * 0.3).logsumexp(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "p"), [(17, 0.0), (17, P), (64, P)])
def test_within_the_error_budget(width: int, p: float, dtype: torch.dtype, every_device: torch.device) -> None:
    check(*rows_of((5, 33, 1, 18, 0, 34), 2, width, dtype, every_device), (5, 33, 1, 18, 0, 34), p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(65, 157, 96), (64, 65), (65, 64), (130, 63)])
@pytest.mark.usefixtures("isa")
def test_long_sentences_beside_short_ones(lengths: tuple[int, ...], dtype: torch.dtype, native: torch.device) -> None:
    """More rows than a block of queries. Blocks of 64 are longer than the 48 of longer sentences, by which scratch memory
    was once measured."""
    check(*rows_of(lengths, 1, 32, dtype, native), lengths, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(16))
def test_random_batches(number: int, dtype: torch.dtype, native: torch.device) -> None:
    draw = random.Random(number)
    heads, width = draw.choice((1, 2, 3)), draw.choice((16, 24, 32, 48, 64, 100, 128))
    longest = draw.choice((1, 3, 17, 33, 48, 65, 130))
    lengths = [draw.randint(1, longest), *(draw.randint(0, longest) for _ in range(draw.randint(0, 5)))]
    check(*rows_of(lengths, heads, width, dtype, native, draw.randint(0, 3)), lengths, draw.choice((0.0, 0.2)))


@pytest.mark.parametrize("lengths", AWKWARD_LENGTHS.values(), ids=AWKWARD_LENGTHS)
def test_awkward_lengths(lengths: tuple[int, ...], device: torch.device) -> None:
    if not sum(lengths):  # no formula to differentiate: nothing but zeros may come out
        qkv, dout = rows_of(lengths, 2, 16, torch.float32, device)
        assert not any(t.any() for t in run(qkv, dout, lengths, 0.2))
        return
    check(*rows_of(lengths, 2, 16, torch.float32, device), lengths, p=0.2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_short_and_tiled_sentences_in_one_batch(dtype: torch.dtype, triton: torch.device) -> None:
    lengths = (70, 3, 0, 34)  # the short kernels end at 64 tokens, at 32 in fp32
    check(*rows_of(lengths, 2, 32, dtype, triton), lengths, 0.1)


@pytest.mark.parametrize("width", [1, 24, 48, 80, 128])
def test_head_widths(width: int, device: torch.device) -> None:
    lengths = (5, 19)
    check(*rows_of(lengths, 1, width, torch.float32, device), lengths)


@pytest.mark.ci
def test_long_sentence(triton: torch.device) -> None:
    check(*rows_of((150,), 1, 16, torch.float16, triton), (150,), p=0.1)


@pytest.mark.ci
def test_more_sentences_than_one_scan_of_the_offsets(triton: torch.device) -> None:
    """The tiled kernels look for long sentences 256 at a time; here long ones come before and after number 256."""
    lengths = (0,) * 250 + (35, 1, 40) + (0,) * 10 + (33,)
    check(*rows_of(lengths, 1, 16, torch.float32, triton), lengths)


@pytest.mark.parametrize("bound", [9, 16, 17, 40])
def test_any_bound_on_the_longest_sentence(bound: int, device: torch.device) -> None:
    check(*rows_of((9, 4), 1, 16, torch.float32, device), (9, 4), bound=bound)


def test_tail_of_many_rows(device: torch.device) -> None:
    """Fewer programs than blocks of tail rows: each clears several."""
    check(*rows_of((3,), 2, 16, torch.float32, device, tail=75), (3,))


def test_any_strides(device: torch.device) -> None:
    """Rows apart, a cotangent by columns or expanded, qkv transposed: the numbers of contiguous tensors."""
    lengths = (12, 21)
    qkv, dout = rows_of(lengths, 2, 16, torch.float32, device)
    apart = torch.cat([qkv.flatten(1), torch.full_like(qkv.flatten(1)[:, :5], torch.nan)], 1)[:, :96].unflatten(
        1, (3, 2, 16)
    )
    turned = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    for other, cotangent in ((apart, dout), (qkv, dout.T.contiguous().T), (turned, dout)):
        for a, b in zip(run(qkv, dout, lengths), run(other, cotangent, lengths), strict=True):
            assert torch.equal(a, b)
    one = torch.ones((), device=device)
    for a, b in zip(run(qkv, one.expand_as(dout), lengths), run(qkv, torch.ones_like(dout), lengths), strict=True):
        assert torch.equal(a, b)


@pytest.mark.ci
def test_rows_beyond_int32(triton: torch.device) -> None:
    """20 rows, 2^27 elements apart: the last begins beyond element 2^31 (untouched pages use no memory)."""
    from minbert_fast.kernels import attention as launchers

    qkv, dout = rows_of((20,), 1, 16, torch.float16, triton, tail=0)
    wide = torch.from_numpy(np.zeros((20, 2**27), np.float16)).to(triton)  # torch.zeros would write them
    apart = wide[:, : 3 * 16].unflatten(1, (3, 1, 16))
    apart.copy_(qkv)
    rest = (offsets((20,), triton), None, 20, 0.25, 0.0, None, SITE)
    results = []
    for each in (qkv, apart):
        out, lse, dqkv = torch.empty_like(dout), torch.empty(1, 20, device=triton), torch.empty_like(qkv)
        launchers.attention_forward(each, *rest, out, lse)
        launchers.attention_backward(dout, each, out, lse, *rest, dqkv)
        results.append((out, lse, dqkv))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def masks(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    holes = torch.rand(3, 21, generator=generator) < 0.6
    left = torch.arange(21)[None] >= torch.tensor([0, 7, 20])[:, None]
    nothing = torch.stack([torch.zeros(21, dtype=torch.bool), holes[0]])
    return {name: mask.to(device) for name, mask in (("holes", holes), ("left", left), ("nothing", nothing))}


@pytest.mark.parametrize("kind", ["holes", "left", "nothing"])
@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(kind: str, p: float, dtype: torch.dtype, every_device: torch.device) -> None:
    mask = masks(every_device)[kind]
    check_dense(mask, 2, p, dtype, every_device)


def check_dense(mask: Tensor, heads: int, p: float, dtype: torch.dtype, device: torch.device) -> None:
    batch, length = mask.shape
    qkv = torch.randn(batch, length, 3, heads, 16, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    dout = torch.randn(batch, length, heads * 16, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    leaf = qkv.clone().requires_grad_()
    out = ops.attention_dense(leaf, mask.long(), 0.25, p, seed_on(device), SITE)
    dqkv = torch.autograd.grad(out, leaf, dout)[0]
    rows = torch.arange(batch * length, device=device)
    keep = keeps(rows, length, heads, p).unflatten(1, (batch, length)).transpose(0, 1)
    expected = tolerance.reference(
        lambda qkv, keep: reference(qkv, mask, 0.25, keep)[0], {"qkv": qkv}, [dout], keep=keep
    )
    expected.check([out.detach(), dqkv])
    assert not out[~mask].any()
    assert not dqkv[~mask].any()


def test_dense_tiled(triton: torch.device) -> None:
    mask = torch.rand(1, 50, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[:, 32:] = False  # the last tile of keys attends to nothing
    check_dense(mask.to(triton), 1, 0.0, torch.float32, triton)


def test_the_backward_needs_the_log_sum_exp(kernels: torch.device) -> None:
    """lse [h, N] is the reference's, zero in rows of no sentence."""
    qkv, _ = rows_of((9, 40), 2, 16, torch.float32, kernels)
    _, lse = attention_forward(qkv, offsets((9, 40), kernels), None, 40, 0.25, 0.0, None, 0)
    for begin, end in ((0, 9), (9, 49)):
        whole = torch.ones(1, end - begin, dtype=torch.bool, device=kernels)
        expected = reference(qkv[None, begin:end], whole, 0.25)[1][0]
        torch.testing.assert_close(lse[:, begin:end], expected, rtol=1e-5, atol=1e-5)
    assert not lse[:, 49:].any()


def test_scores_too_large_for_a_naive_softmax(device: torch.device) -> None:
    qkv = torch.full((4, 3, 1, 16), 40.0, device=device)
    qkv[1, 1] = -40.0  # this key's weight is e^-51200
    out = ops.attention(qkv, offsets((4,), device), 4, 1.0)
    torch.testing.assert_close(out, torch.full((4, 16), 40.0, device=device))


def test_a_negative_scale(native: torch.device) -> None:
    check(*rows_of((20, 10), 2, 24, torch.float32, native), (20, 10), scale=-3.0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other_sentence(poison: float, native: torch.device) -> None:
    qkv, _ = rows_of((4, 5), 2, 20, torch.float32, native, tail=0)
    qkv[2, 0, 0, 5] = poison
    out = ops.attention(qkv, offsets((4, 5)), 5, 0.3)
    assert out[2, :20].isnan().all()
    assert torch.isfinite(out[3:]).all()


def test_dropout_is_the_documented_stream_bit_for_bit(every_device: torch.device) -> None:
    """Equal scores, and values that count keys: row i of the output is its mask over the number of keys."""
    lengths, heads, width = (8, 64, 16), 2, 64
    qkv = torch.zeros(88, 3, heads, width, device=every_device)
    begins = offsets(lengths).tolist()
    for begin, n in zip(begins, lengths, strict=False):
        qkv[begin : begin + n, 2] = torch.eye(n, width, device=every_device)[:, None]
    out = ops.attention(qkv, offsets(lengths, every_device), 64, 1.0, 0.5, seed_on(every_device), SITE)
    for begin, n in zip(begins, lengths, strict=False):
        got = out[begin : begin + n].unflatten(1, (heads, width)).transpose(0, 1)[..., :n]
        assert torch.equal(got * n, keeps(torch.arange(begin, begin + n, device=every_device), n, heads, 0.5))


def test_same_bits_twice(device: torch.device) -> None:
    lengths = (33, 5)
    qkv, dout = rows_of(lengths, 2, 16, torch.float32, device)
    for a, b in zip(run(qkv, dout, lengths, 0.1), run(qkv, dout, lengths, 0.1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("lengths", "tail"), [((), 4), ((0, 0), 0), ((0,), 2)])
def test_no_sentences_and_no_rows(lengths: tuple[int, ...], tail: int, device: torch.device) -> None:
    qkv, dout = rows_of(lengths, 2, 16, torch.float32, device, tail)
    out, dqkv = run(qkv, dout, lengths, bound=0)
    assert out.shape == dout.shape
    assert not out.any()
    assert not dqkv.any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_rectangle_without_rows(shape: tuple[int, int], device: torch.device) -> None:
    qkv = torch.zeros(*shape, 3, 2, 16, device=device, requires_grad=True)
    out = ops.attention_dense(qkv, torch.ones(shape, device=device), 1.0)
    assert out.shape == (*shape, 32)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient.shape == qkv.shape


def test_refusals_name_what_is_wrong() -> None:
    qkv, cu_seqlens, seed = torch.zeros(4, 3, 1, 16), offsets((4,)), torch.tensor([1])
    with pytest.raises(ValueError, match=r"qkv must have shape \[N, 3, heads, head_dim\]"):
        ops.attention(qkv[:, :2], cu_seqlens, 4, 1.0)
    for nothing in (qkv[..., :0], qkv[:, :, :0]):  # the extension would divide by them
        with pytest.raises(ValueError, match="heads and head_dim not 0"):
            ops.attention(nothing, cu_seqlens, 4, 1.0)
        with pytest.raises(ValueError, match="heads and head_dim not 0"):
            ops.attention_dense(nothing[None], torch.ones(1, 4), 1.0)
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32"):
        ops.attention(qkv, cu_seqlens.long(), 4, 1.0)
    with pytest.raises(ValueError, match=r"mask must be \[1, 4\]"):
        ops.attention_dense(qkv[None], torch.ones(2, 4), 1.0)
    for p, given in ((1.0, seed), (-0.5, seed), (float("nan"), seed), (0.1, None)):
        with pytest.raises(ValueError, match="dropout needs"):
            ops.attention(qkv, cu_seqlens, 4, 1.0, p, given)


def test_a_head_too_wide_is_refused(triton: torch.device) -> None:
    with pytest.raises(ValueError, match="head_dim up to 128"):
        ops.attention(torch.zeros(4, 3, 1, 129, device=triton), offsets((4,), triton), 4, 1.0)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gradcheck(p: float) -> None:
    """In fp64, by the formula; dense with padding on the left, everywhere and nowhere."""
    qkv, _ = rows_of((5, 0, 7, 1), 2, 8, torch.float64, torch.device("cpu"))
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    seed, cu_seqlens = torch.tensor([3]), offsets((5, 0, 7, 1))
    dense = qkv[:15].unflatten(0, (3, 5)).clone().requires_grad_()
    packed = qkv.requires_grad_()
    for inputs, call in (
        (packed, lambda t: ops.attention(t, cu_seqlens, 7, 0.3, p, seed, 4)),
        (dense, lambda t: ops.attention_dense(t, mask, 0.3, p, seed, 4)),
    ):
        assert torch.autograd.gradcheck(call, [inputs], fast_mode=True)


@pytest.mark.parametrize("dense", [False, True])
def test_opcheck(dense: bool) -> None:
    """Schemas tell the truth about mutation and aliasing, fakes about shapes."""
    assert backend.implementation(torch.zeros(1)) == "native"
    qkv, dout = rows_of((5, 7), 2, 8, torch.float32, torch.device("cpu"), tail=0)
    mask = torch.ones(3, 4, dtype=torch.bool)
    rest = (None if dense else int32(0, 5, 12), mask if dense else None, 7, 0.3, 0.25, torch.tensor([3]), 4)
    out, lse = attention_forward(qkv, *rest)
    torch.library.opcheck(attention_forward.overload, (qkv, *rest))
    torch.library.opcheck(attention_backward.overload, (dout, qkv, out, lse, *rest))


# ---- On a GPU: real sizes --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("longest", [16, 32, 64, 128, 600])
def test_real_sizes(dtype: torch.dtype, width: int, longest: int, triton: torch.device) -> None:
    lengths = torch.randint(1, longest + 1, (24,), generator=torch.Generator().manual_seed(longest)).tolist()
    qkv, dout = rows_of(lengths, 12, width, dtype, triton, tail=200)
    check(qkv, dout, lengths, p=0.1, bound=longest)
    for a, b in zip(run(qkv, dout, lengths, 0.1), run(qkv, dout, lengths, 0.1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_captured_graph_follows_lengths_and_seed(triton: torch.device) -> None:
    """One graph serves any sentences that fit its capacity, and draws a new mask for a new seed."""
    capacity, bound = 512, 128
    qkv, dout = rows_of((capacity,), 12, 64, torch.bfloat16, triton, tail=0)
    seed = torch.tensor([1], device=triton)
    cu_seqlens = offsets([100, 9] + [0] * 14, triton)
    rest = (cu_seqlens, None, bound, 0.125, 0.1, seed, SITE)

    def step() -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(qkv, *rest)
        return out, attention_backward(dout, qkv, out, lse, *rest)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number, lengths in enumerate(([17] * 16, [128, 0, 70] + [3] * 13)):
        seed.fill_(number)
        cu_seqlens.copy_(offsets(lengths, triton))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
