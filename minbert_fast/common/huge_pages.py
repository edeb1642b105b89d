# SPDX-License-Identifier: Apache-2.0
"""Long buffers in huge memory pages.

A core that reads through 4 KB pages must translate an address at each page, and its prefetcher stops there too. In 2 MB
pages the same two cores read 1.2 to 1.8 times as fast (benchmarks/LOG.md). Linux uses huge pages for memory that
requests them (`madvise`) before its first use. Other systems, and a refusal, leave ordinary pages.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """`torch.empty`; a long CPU tensor requests huge pages."""
    tensor = torch.empty(*shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu":
        _request_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros`; a long CPU tensor requests huge pages."""
    return empty(*shape, dtype=dtype, device=device).zero_()


def _request_huge_pages(address: int, length: int) -> None:
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if end - begin >= HUGE_PAGE_BYTES and sys.platform == "linux":
        # A refusal has no effect, so the result is not checked.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
