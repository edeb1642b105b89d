# SPDX-License-Identifier: Apache-2.0
"""Attention kernels against the reference in fp64: packed and dense, short and tiled, with and without dropout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from minbert_fast.kernels import attention as kernels
from minbert_fast.ops import reference as plain
from minbert_fast.ops.dropout import keep_mask
from tests.tolerance import AWKWARD_LENGTHS, offsets, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SITE = 5
# attention_dropout_mask(2 rows, 2 heads, 20 keys, p = 0.5), a string a row, head by head.
GOLDEN = ["00100100101110010100", "00110100000101000011", "11101101100110110100", "00010010110011101011"]


def rows_of(lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype, device: torch.device, tail: int = 3):
    """Random qkv [N, 3, h, d] and dout [N, h * d]; `tail` rows belong to no sentence."""
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * width)
    rows = sum(lengths) + tail
    qkv = torch.randn(rows, 3, heads, width, generator=generator)
    dout = torch.randn(rows, heads * width, generator=generator)
    return qkv.to(device, dtype), dout.to(device, dtype)


def run(qkv: Tensor, dout: Tensor, lengths: Sequence[int], p: float = 0.0, bound: int | None = None):
    """out, lse, dqkv of the kernels, and the seed they drew from."""
    seed = torch.tensor([2**40 + 11], device=qkv.device)
    cu_seqlens = offsets(lengths, qkv.device)
    rest = (cu_seqlens, max(lengths) if bound is None else bound, qkv.shape[3] ** -0.5, p, seed, SITE)
    out, lse = kernels.attention_forward(qkv, *rest)
    return out, lse, kernels.attention_backward(dout, qkv, out, lse, *rest), seed


def check(qkv: Tensor, dout: Tensor, lengths: Sequence[int], p: float = 0.0, bound: int | None = None) -> None:
    """Holds the kernels to the error budget, dropout by the very mask that they drew."""
    out, lse, dqkv, seed = run(qkv, dout, lengths, p, bound)
    bounds = list(itertools.pairwise(offsets(lengths).tolist()))
    keep = None
    if p:
        factors = kernels.attention_dropout_mask(len(qkv), qkv.shape[2], max(*lengths, 1), p, seed, SITE)
        keep = [factors[:, begin:end, : end - begin] for begin, end in bounds]

    def formula(qkv: Tensor, keep: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        out, lse = plain.attention(qkv, offsets(lengths).tolist(), qkv.shape[3] ** -0.5, keep)
        return out, lse if lse.dtype == torch.float64 else lse.float()

    reference(formula, {"qkv": qkv}, [dout, None], keep=keep).check([out, lse, dqkv])
    end = sum(lengths)
    assert not out[end:].any()
    assert not lse[:, end:].any()
    assert not dqkv[end:].any()


@pytest.mark.parametrize("lengths", AWKWARD_LENGTHS.values(), ids=AWKWARD_LENGTHS)
def test_awkward_lengths(lengths: tuple[int, ...], device: torch.device) -> None:
    if not sum(lengths):  # no formula to differentiate: nothing but zeros may come out
        qkv, dout = rows_of(lengths, 2, 16, torch.float32, device)
        assert not any(t.any() for t in run(qkv, dout, lengths, 0.2, None)[:3])
        return
    check(*rows_of(lengths, 2, 16, torch.float32, device), lengths, p=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_short_and_tiled_sentences_in_one_batch(dtype: torch.dtype, p: float, device: torch.device) -> None:
    lengths = (70, 3, 0, 34)  # the short kernels end at 64 tokens, at 32 in fp32
    check(*rows_of(lengths, 2, 32, dtype, device), lengths, p)


@pytest.mark.parametrize("width", [1, 24, 48, 80, 128])
def test_head_widths(width: int, device: torch.device) -> None:
    lengths = (5, 19)
    check(*rows_of(lengths, 1, width, torch.float32, device), lengths)


def test_long_sentence(device: torch.device) -> None:
    check(*rows_of((300,), 1, 16, torch.float16, device), (300,), p=0.1)


def test_more_sentences_than_one_scan_of_the_offsets(device: torch.device) -> None:
    """The tiled kernels look for long sentences 256 at a time; here the long ones stand on both sides of that."""
    lengths = (0,) * 250 + (35, 1, 40) + (0,) * 10 + (33,)
    check(*rows_of(lengths, 1, 16, torch.float32, device), lengths)


@pytest.mark.parametrize("bound", [9, 16, 17, 40])
def test_any_bound_on_the_longest_sentence(bound: int, device: torch.device) -> None:
    check(*rows_of((9, 4), 1, 16, torch.float32, device), (9, 4), bound=bound)


def test_tail_of_many_rows(device: torch.device) -> None:
    """Fewer programs than blocks of tail rows: each clears several."""
    check(*rows_of((3,), 2, 16, torch.float32, device, tail=75), (3,))


def test_rows_any_distance_apart(device: torch.device) -> None:
    lengths = (12, 21)
    qkv, dout = rows_of(lengths, 2, 16, torch.float32, device)
    wide = torch.cat([qkv.flatten(1), torch.full_like(qkv.flatten(1)[:, :5], torch.nan)], 1)
    apart = wide[:, : 3 * 2 * 16].unflatten(1, (3, 2, 16))
    columns = dout.T.contiguous().T  # its last dimension is not contiguous
    for other, cotangent in ((apart, dout), (qkv, columns), (qkv.transpose(2, 3).contiguous().transpose(2, 3), dout)):
        for a, b in zip(run(qkv, dout, lengths), run(other, cotangent, lengths), strict=True):
            assert torch.equal(a, b)


def test_rows_beyond_int32(device: torch.device) -> None:
    """20 rows, 2^27 elements apart: the last lies behind element 2^31 (pages never touched take no memory)."""
    lengths = (20,)
    qkv, dout = rows_of(lengths, 1, 16, torch.float16, device, tail=0)
    wide = torch.zeros(20, 2**27, dtype=torch.float16, device=device)
    apart = wide[:, : 3 * 16].unflatten(1, (3, 1, 16))
    apart.copy_(qkv)
    for a, b in zip(run(qkv, dout, lengths), run(apart, dout, lengths), strict=True):
        assert torch.equal(a, b)


def masks(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    holes = torch.rand(3, 21, generator=generator) < 0.6
    left = torch.arange(21)[None] >= torch.tensor([0, 7, 20])[:, None]
    nothing = torch.stack([torch.zeros(21, dtype=torch.bool), holes[0]])
    return {name: mask.to(device) for name, mask in (("holes", holes), ("left", left), ("nothing", nothing))}


@pytest.mark.parametrize("kind", ["holes", "left", "nothing"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dense(kind: str, p: float, device: torch.device) -> None:
    mask = masks(device)[kind]
    batch, length = mask.shape
    qkv = torch.randn(batch, length, 3, 2, 16, generator=torch.Generator().manual_seed(1)).to(device)
    dout = torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(2)).to(device)
    seed = torch.tensor([9], device=device)
    out, lse = kernels.attention_dense_forward(qkv, mask.long(), 0.25, p, seed, SITE)
    dqkv = kernels.attention_dense_backward(dout, qkv, out, lse, mask.long(), 0.25, p, seed, SITE)
    keep = None
    if p:
        factors = kernels.attention_dropout_mask(batch * length, 2, length, p, seed, SITE)
        keep = factors.unflatten(1, (batch, length)).transpose(0, 1)
    expected = reference(plain.attention_dense, {"qkv": qkv}, [dout], mask=mask, scale=0.25, keep=keep)
    expected.check([out, dqkv])
    assert torch.isfinite(lse).all()
    assert not out[~mask].any()
    assert not dqkv[~mask].any()


def test_dense_tiled(device: torch.device) -> None:
    mask = torch.rand(1, 50, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[:, 32:] = False  # the last tile of keys attends to nothing
    qkv = torch.randn(1, 50, 3, 1, 16, generator=torch.Generator().manual_seed(1)).to(device)
    dout = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(2)).to(device)
    out, lse = kernels.attention_dense_forward(qkv, mask.to(device), 0.25)
    dqkv = kernels.attention_dense_backward(dout, qkv, out, lse, mask.to(device), 0.25)
    expected = reference(plain.attention_dense, {"qkv": qkv}, [dout], mask=mask.to(device), scale=0.25)
    expected.check([out, dqkv])


def test_dropout_stream_is_pinned(device: torch.device) -> None:
    """Golden values: another Triton, another chip or another tile draws the same masks."""
    seed = torch.tensor([-(2**61) + 12345], device=device)
    keep = kernels.attention_dropout_mask(2, 2, 20, 0.5, seed, SITE) != 0
    drawn = ["".join("01"[int(k)] for k in row) for row in keep.flatten(0, 1).tolist()]
    assert drawn == GOLDEN


def test_dropout_stream_is_the_one_of_plain_pytorch(device: torch.device) -> None:
    seed = torch.tensor([2**33 + 1], device=device)
    rows = torch.arange(7, device=device)
    for head, factors in enumerate(kernels.attention_dropout_mask(7, 3, 37, 0.15, seed, SITE)):
        expected = keep_mask(seed, SITE, rows, 37, 0.15, plane=head)
        assert torch.equal(factors != 0, expected != 0)
        torch.testing.assert_close(factors, expected, atol=0, rtol=2e-7)  # 1 / (1 - p) may round another way


def test_dropout_statistics(device: torch.device) -> None:
    """Kept fraction within five standard deviations; masks of different heads, rows, sites and seeds unrelated."""
    p, shape = 0.3, (4, 64, 64)
    draw: Callable[[int, int], Tensor] = lambda seed, site: (  # noqa: E731
        kernels.attention_dropout_mask(64, 4, 64, p, torch.tensor([seed], device=device), site)
    )
    first = draw(1, 1)
    assert first.shape == shape
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    keep = (first != 0).double()
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - (1 - p)) < 5 * deviation
    for other in (draw(1, 2), draw(2, 1), first.roll(1, 0), first.roll(1, 1), first.roll(1, 2)):
        covariance = ((keep - 1 + p) * ((other != 0).double() - 1 + p)).mean().item()
        assert abs(covariance) < 5 * p * (1 - p) / keep.numel() ** 0.5


def test_same_bits_twice(device: torch.device) -> None:
    lengths = (33, 5, 40)
    qkv, dout = rows_of(lengths, 2, 16, torch.float32, device)
    for a, b in zip(run(qkv, dout, lengths, 0.1), run(qkv, dout, lengths, 0.1), strict=True):
        assert torch.equal(a, b)


def test_no_sentences_and_no_rows(device: torch.device) -> None:
    for lengths, tail in (((), 4), ((0, 0), 0)):
        qkv, dout = rows_of(lengths, 2, 16, torch.float32, device, tail)
        out, lse, dqkv, _ = run(qkv, dout, lengths, bound=0)
        assert out.shape == dout.shape
        assert lse.shape == (2, tail)
        assert not out.any()
        assert not dqkv.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(4, 3, 1, 129)}, "head_dim up to 128"),
        ({"qkv": torch.zeros(4, 2, 1, 16)}, "must be"),
        ({"qkv": torch.zeros(4, 3, 1, 16, dtype=torch.float64)}, "float64"),
        ({"p": 1.0}, "probability"),
        ({"p": 0.1, "seed": None}, "seed"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    arguments = {"qkv": torch.zeros(4, 3, 1, 16), "cu_seqlens": offsets((4,)), "max_seqlen": 4, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        kernels.attention_forward(**arguments)


# ---- On a GPU: real sizes --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("longest", [16, 32, 64, 128, 600])
def test_real_sizes(dtype: torch.dtype, width: int, longest: int, device: torch.device) -> None:
    lengths = torch.randint(1, longest + 1, (24,), generator=torch.Generator().manual_seed(longest)).tolist()
    qkv, dout = rows_of(lengths, 12, width, dtype, device, tail=200)
    check(qkv, dout, lengths, p=0.1, bound=longest)
    for a, b in zip(run(qkv, dout, lengths, 0.1), run(qkv, dout, lengths, 0.1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_captured_graph_follows_lengths_and_seed(device: torch.device) -> None:
    """One graph serves any sentences that fit its capacity, and draws a new mask for a new seed."""
    capacity, bound = 512, 128
    qkv, dout = rows_of((capacity,), 12, 64, torch.bfloat16, device, tail=0)
    seed = torch.tensor([1], device=device)
    cu_seqlens = offsets([100, 9] + [0] * 14, device)
    rest = (cu_seqlens, bound, 0.125, 0.1, seed, SITE)

    def step() -> tuple[Tensor, Tensor]:
        out, lse = kernels.attention_forward(qkv, *rest)
        return out, kernels.attention_backward(dout, qkv, out, lse, *rest)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number, lengths in enumerate(([17] * 16, [128, 0, 70] + [3] * 13)):
        seed.fill_(number)
        cu_seqlens.copy_(offsets(lengths, device))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)
