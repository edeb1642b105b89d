# SPDX-License-Identifier: Apache-2.0
"""Long buffers ask for huge pages before they are touched; short ones and other systems are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minbert_fast.common import pages

MAPS = Path("/proc/self/smaps")
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asked(address: int) -> bool:
    """Whether the mapping that holds `address` has asked for huge pages."""
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
def test_a_long_buffer_asks_for_huge_pages() -> None:
    long = pages.zeros(3, 24 << 20)
    assert asked(long.data_ptr() + long.nbytes // 2)
    plain = torch.zeros(3, 24 << 20)
    assert not asked(plain.data_ptr() + plain.nbytes // 2)


@pytest.mark.parametrize("shape", [(0,), (3,), (2, 700_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = pages.zeros(*shape, dtype=dtype)
    assert made.dtype == dtype
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
