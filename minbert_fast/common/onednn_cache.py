# SPDX-License-Identifier: Apache-2.0
"""Limits PyTorch's caches of compiled matrix products on a CPU.

oneDNN compiles code for each shape of a matrix product, up to 2 MB each. Two caches keep the last 1,024 per thread:
gigabytes after a few hundred bf16 steps (benchmarks/LOG.md). A step uses 8 shapes with its number of rows, of which there
are few (data/buckets.py), and 4 with each task's, the same ones in every layer. The caches read their capacity from the
environment at the first matrix product.
"""

from __future__ import annotations

import os

CAPACITY = 256  # compiled products: those of some ten numbers of rows, and of the last steps' tasks
VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # of PyTorch's cache, of oneDNN's own


def limit_caches() -> None:
    """Sets the capacities that the environment does not set. Call before the first matrix product of the process."""
    for variable in VARIABLES:
        os.environ.setdefault(variable, str(CAPACITY))
