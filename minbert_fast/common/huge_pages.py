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
    if tensor.device.type == "cpu" and sys.platform == "linux":
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length >= HUGE_PAGE_BYTES:  # the result is not checked: a refusal has no effect
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros`; a long CPU tensor requests huge pages."""
    return empty(*shape, dtype=dtype, device=device).zero_()
