# SPDX-License-Identifier: Apache-2.0
"""Memory for long buffers that are read from end to end: in huge pages, where the system has them to give.

A core that streams through pages of 4 KB stops to translate at every one, and its prefetcher with it. In pages of 2 MB the
same two cores read 1.2 to 1.8 times as fast (benchmarks/LOG.md). Linux gives them to memory that asks (`madvise`) before it
is first touched; elsewhere, and where the system says no, nothing changes.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page; a buffer of fewer cannot hold one


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """`torch.empty`, in huge pages where it is worth it."""
    made = torch.empty(*shape, dtype=dtype, device=device)
    if made.device.type == "cpu":
        _ask(made.data_ptr(), made.nbytes)
    return made


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros`, in huge pages where it is worth it."""
    return empty(*shape, dtype=dtype, device=device).zero_()


def _ask(address: int, length: int) -> None:
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if end - begin >= HUGE and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE
        )  # a refusal costs nothing
