# SPDX-License-Identifier: Apache-2.0
"""Dropout streams: Philox against its published answers, one mask from three programs, independence, the right rate."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.dropout import keep_scale, keep_scale_quads
from minbert_fast.ops.dropout import keep_mask, philox

# Known answers for philox4x32-7 from the Random123 distribution (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, -1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@triton.jit
def _masks(
    seed_ptr,
    single_ptr,
    quads_ptr,
    site,
    plane,
    first,
    p: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    seed = tl.load(seed_ptr)
    row = first + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    out = tl.arange(0, ROWS)[:, None] * COLUMNS + column
    tl.store(single_ptr + out, keep_scale(seed, site, plane, row, column, p))
    quad = tl.arange(0, COLUMNS // 4)[None, :]
    tl.store(quads_ptr + out, keep_scale_quads(seed, site, plane, row, quad, p))


def masks(device: torch.device, seed: int, site: int, plane: int, first: int, p: float) -> tuple[Tensor, Tensor]:
    single, quads = torch.empty(2, 32, 64, device=device)
    _masks[(1,)](torch.tensor([seed], device=device), single, quads, site, plane, first, p=p, ROWS=32, COLUMNS=64)
    return single, quads


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_its_published_answers(counter: tuple[int, ...], key: int, answer: tuple[int, ...]) -> None:
    words = philox(torch.tensor(key), tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize(
    ("seed", "site", "plane", "first"),
    [(0, 0, 0, 0), (1, 1, 0, 0), (2**62 + 12345, 25, 11, 30_000), (-7, 2, 3, 2**31 - 40)],
)
def test_one_mask_from_three_programs(device: torch.device, seed: int, site: int, plane: int, first: int) -> None:
    single, quads = masks(device, seed, site, plane, first, 0.3)
    rows = torch.arange(first, first + 32, device=device)
    expected = keep_mask(torch.tensor([seed], device=device), site, rows, 64, 0.3, plane)
    torch.testing.assert_close(single, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(quads, expected, rtol=1e-6, atol=0)


def test_every_coordinate_changes_the_mask(device: torch.device) -> None:
    base = (3, 1, 2, 4)
    variants = [base, (4, 1, 2, 4), (3 + 2**40, 1, 2, 4), (3, 2, 2, 4), (3, 1, 3, 4), (3, 1, 2, 36)]
    drawn = torch.stack([masks(device, *v, p=0.5)[0].flatten() > 0 for v in variants]).double()
    agreement = (drawn @ drawn.T + (1 - drawn) @ (1 - drawn).T) / drawn.shape[1]
    off_diagonal = agreement[~torch.eye(len(variants), dtype=torch.bool, device=device)]
    # 2,048 fair coins agree with others half the time, give or take 1.1 %: five standard deviations.
    assert (off_diagonal - 0.5).abs().max() < 0.055


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    keep = keep_mask(torch.tensor([11]), 4, torch.arange(500), 400, p)
    kept = keep > 0
    assert torch.equal(keep[kept].unique(), torch.tensor([1 / (1 - p)]))
    # A binomial share of 200,000 draws: five standard deviations; rows and columns apart, against patterns.
    assert abs(float(kept.double().mean()) - (1 - p)) <= 5 * (p * (1 - p) / keep.numel()) ** 0.5
    for dim in (0, 1):
        spread = kept.double().mean(dim)
        assert (spread - (1 - p)).abs().max() <= 6 * (p * (1 - p) / keep.shape[dim]) ** 0.5
