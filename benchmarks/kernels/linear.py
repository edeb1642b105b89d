# SPDX-License-Identifier: Apache-2.0
"""linear: every task's weight gradient, against a product a task and against one product for all tasks.

FLOPs: 2 N O I, the same for all three (a sum over rows, cut at other places). Bytes: inputs e N (O + I), output 4 T
O I.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Candidate
from benchmarks.kernels.case import MATRICES, TASKS, Case, bounds, close, draw, label
from minbert_fast.ops.linear import linear_gradients

ROWS = {"cpu": [2770], "cuda": [2770, 32768]}


def cases(device: torch.device) -> Iterator[Case]:
    for rows in ROWS[device.type]:
        for outputs, inputs in MATRICES:
            yield _case(rows, outputs, inputs, torch.bfloat16, device)


def _case(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Case:
    dy = draw(rows, outputs, dtype=dtype, device=device)
    x = draw(rows, inputs, dtype=dtype, device=device)
    tasks = bounds(rows, device)
    cut = tasks.tolist()
    out = torch.empty(TASKS, outputs, inputs, device=device)
    each = torch.empty(TASKS, outputs, inputs, device=device, dtype=dtype)

    def ours() -> None:
        linear_gradients(dy, x, tasks, out, None)

    def product_a_task() -> None:
        for task in range(TASKS):
            torch.mm(dy[cut[task] : cut[task + 1]].T, x[cut[task] : cut[task + 1]], out=each[task])

    def check() -> None:
        ours()
        for task in range(TASKS):
            rows_of = slice(cut[task], cut[task + 1])
            close(f"task {task}", out[task], dy[rows_of].double().T @ x[rows_of].double(), dtype)

    flops = 2 * rows * outputs * inputs
    moved = dy.element_size() * rows * (outputs + inputs) + 4 * out.numel()
    return Case(
        label("linear backward", dtype, rows, outputs, inputs),
        {
            "ours": Candidate(ours, check, moved, flops),
            "torch.mm a task": Candidate(product_a_task, None, moved, flops),
            "torch.mm, tasks summed": Candidate(lambda: torch.mm(dy.T, x), None, None, flops),
        },
    )
