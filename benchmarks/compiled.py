# SPDX-License-Identifier: Apache-2.0
"""Our step beside transformers with torch.compile, whose warm-up alone takes minutes: apart from the suite `step`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import step
from benchmarks.gradients import CONFIGS
from benchmarks.harness import Ceilings, Row


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """Both shapes with PCGrad, the smaller first."""
    if device.type == "cpu":
        yield Row("compiled", "3 x 32 examples", "all", note="on a CPU the step suite has this baseline")
        return
    low = step.lowest_precision(device, ceilings)
    for shape, config in CONFIGS.items():
        makers = step.candidate_makers("pcgrad", low, device)
        chosen = {name: make for name, make in makers.items() if name in ("ours", step.COMPILED)}
        yield from step.run_case(f"{shape}, 3 x 32 examples, pcgrad, compiled", chosen, config, 3, 32, device, ceilings)
