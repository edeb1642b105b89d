# SPDX-License-Identifier: Apache-2.0
"""combine: g = w J, as it runs here and by Triton, against torch.mv. Bytes a parameter: e T + 4 for T tasks.

On a CPU the surgery suite times it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Candidate
from benchmarks.kernels.case import JACOBIANS, Case, close, draw, label, triton_too
from minbert_fast import ops


def cases(device: torch.device) -> Iterator[Case]:
    for tasks, count in JACOBIANS[device.type]:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(tasks, count, dtype, device)


def _case(tasks: int, count: int, dtype: torch.dtype, device: torch.device) -> Case:
    J = draw(tasks, count, dtype=dtype, device=device)
    w, out = draw(tasks, dtype=torch.float32, device=device), torch.empty(count, device=device)

    def check() -> None:
        ops.combine(J, w, out)
        for begin in range(0, count, 1 << 22):
            piece = slice(begin, begin + (1 << 22))
            close("g", out[piece], w.double() @ J[:, piece].double(), torch.float32)

    moved = J.numel() * J.element_size() + 4 * count
    ours = Candidate(lambda: ops.combine(J, w, out), check, moved)
    rows, weights = J.T, w.to(dtype)
    return Case(
        label("combine", dtype, tasks, count),
        triton_too(ours, J) | {"torch.mv": Candidate(lambda: torch.mv(rows, weights), None, moved)},
    )
