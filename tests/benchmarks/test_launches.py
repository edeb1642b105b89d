# SPDX-License-Identifier: Apache-2.0
"""The sweep over launch settings: each setting reaches its kernel."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

from benchmarks import launches
from minbert_fast.kernels.launches import intercepted


@pytest.mark.parametrize("kernel", launches.SWEEPS)
def test_each_setting_launches_its_own_variant(kernel: str) -> None:
    found: dict[str, set[str]] = {}
    for variant in launches.variants(torch.device("meta"), [kernel]):
        seen: list[str] = []

        def take(
            function: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: list[str] = seen
        ) -> None:
            numbers = [value for value in args if isinstance(value, int)]
            seen.append(f"{function.__name__} {grid} {numbers} {kwargs}")

        with intercepted(GPUTarget("cuda", 90, 32), take):
            variant.call(lambda run: run())
        assert seen
        found.setdefault(f"{variant.kernel}, {variant.shape}", set()).add("; ".join(seen))
    counts = Counter(f"{v.kernel}, {v.shape}" for v in launches.variants(torch.device("meta"), [kernel]))
    assert {name: len(launched) for name, launched in found.items()} == counts
