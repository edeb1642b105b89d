# SPDX-License-Identifier: Apache-2.0
"""Bounds what PyTorch keeps of past matrix products on a CPU, where packed batches hardly ever have one size twice.

oneDNN compiles a product for each shape that it meets, up to two megabytes of code and buffers, and two caches keep the last
1,024 of them a thread: gigabytes after a few hundred steps in bf16 (benchmarks/LOG.md). One step needs some twenty, again in
each layer, and the next one none of them. The caches read their sizes from the environment at the first product; what stands
there already is left alone.
"""

from __future__ import annotations

import os

KEPT = 128  # compiled products; a step takes 8 and 4 a task
VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # of PyTorch's cache, of oneDNN's own


def bound_caches() -> None:
    """To be called before the first product of the process, or it changes nothing."""
    for variable in VARIABLES:
        os.environ.setdefault(variable, str(KEPT))
