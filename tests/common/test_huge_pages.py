# SPDX-License-Identifier: Apache-2.0
"""Long CPU buffers request huge pages before their first use; short ones do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minbert_fast.common import huge_pages

MAPS = Path("/proc/self/smaps")
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asked(address: int) -> bool:
    """Whether the memory mapping that contains `address` has requested huge pages."""
    inside = False
    for line in MAPS.read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    return False


@pytest.mark.skipif(not (MAPS.exists() and SWITCH.exists()), reason="this system shows no huge pages")
def test_a_long_buffer_requests_huge_pages() -> None:
    long = huge_pages.zeros(3, 4 << 20)  # more than the 32 MB up to which malloc may use memory again
    assert asked(long.data_ptr() + long.nbytes // 2)
    plain = torch.zeros(3, 4 << 20)
    assert not asked(plain.data_ptr() + plain.nbytes // 2)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 700_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = huge_pages.zeros(*shape, dtype=dtype)
    assert made.dtype == dtype
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
