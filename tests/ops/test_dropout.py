# SPDX-License-Identifier: Apache-2.0
"""Dropout streams: Philox against its published answers, independence, the right rate. The ops' tests check their masks."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_its_published_answers(counter: tuple[int, ...], key: int, answer: tuple[int, ...]) -> None:
    words = philox(torch.tensor(key), tuple(torch.tensor(word) for word in counter))
    assert tuple(int(word) for word in words) == answer


def test_every_coordinate_changes_the_mask() -> None:
    base = (3, 1, 4, 2)  # seed, site, first row, plane
    variants = [base, (4, 1, 4, 2), (3 + 2**40, 1, 4, 2), (3, 2, 4, 2), (3, 1, 4, 3), (3, 1, 36, 2)]
    drawn = torch.stack([
        keep_mask(torch.tensor([seed]), site, torch.arange(first, first + 32), 64, 0.5, plane).flatten() > 0
        for seed, site, first, plane in variants
    ]).double()  # fmt: skip
    agreement = (drawn @ drawn.T + (1 - drawn) @ (1 - drawn).T) / drawn.shape[1]
    off_diagonal = agreement[~torch.eye(len(variants), dtype=torch.bool)]
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
