# SPDX-License-Identifier: Apache-2.0
"""gram: G = J J^T, as it runs here and by Triton, against one matrix product. Bytes a parameter: e T for T tasks.

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
    out = torch.empty(tasks, tasks, device=device)

    def check() -> None:
        exact = torch.zeros(tasks, tasks, dtype=torch.float64, device=device)
        for piece in J.split(1 << 22, dim=1):
            exact += piece.double() @ piece.double().T
        close("G", ops.gram(J, out), exact, torch.float32)

    moved = J.numel() * J.element_size()
    ours = Candidate(lambda: ops.gram(J, out), check, moved)
    return Case(
        label("gram", dtype, tasks, count),
        triton_too(ours, J) | {"J @ J.T": Candidate(lambda: J @ J.T, None, moved)},
    )
