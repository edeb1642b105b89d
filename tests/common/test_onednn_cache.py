# SPDX-License-Identifier: Apache-2.0
"""oneDNN's caches of compiled matrix products are bounded, so a process does not grow with new batch sizes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from minbert_fast.common import onednn_cache

MANY = """
import ctypes, torch, minbert_fast
class Heap(ctypes.Structure):  # glibc's mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c d e f used free keep".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
weight = torch.ones(256, 128, dtype=torch.bfloat16)
used = []
for shapes in (range(1, 300), range(300, 600)):
    for rows in shapes:
        torch.mm(torch.ones(rows, 128, dtype=torch.bfloat16), weight.T)
    used.append(libc.mallinfo2().used)
print(used[1] - used[0])
"""


@pytest.mark.ci
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc says how much of its heap is in use"
)
def test_products_of_new_shapes_do_not_grow_the_heap() -> None:
    """Over 300 products of new shapes the heap grows by 7 MB, and by 180 MB without the bound."""
    environment = {key: value for key, value in os.environ.items() if key not in onednn_cache.VARIABLES}
    command = [sys.executable, "-c", MANY]
    grown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 18e6


def test_values_of_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = onednn_cache.VARIABLES
    monkeypatch.setenv(first, "7")
    monkeypatch.delenv(second, raising=False)
    onednn_cache.limit_caches()
    assert (os.environ[first], os.environ[second]) == ("7", str(onednn_cache.CAPACITY))
