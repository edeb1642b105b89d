# SPDX-License-Identifier: Apache-2.0
"""adamw: w J and the step in one pass, as it runs here and by Triton, against torch's product and fused AdamW.

On a CPU the surgery suite times it. Bytes a parameter: p, m, v read and written 24, J of T tasks 4 T, the bf16 copy 2.
By rows, an untouched row has no gradient to read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.harness import Candidate
from benchmarks.kernels.case import TASKS, Case, close, draw, label, triton_too
from minbert_fast import ops
from minbert_fast.ops import AdamWStep

SIZES = {"cpu": {}, "cuda": {"MiniLM-L6": 22_713_216, "BERT-base": 109_482_240}}
TABLES = {"cpu": [], "cuda": [(30522, 768, 1000)]}  # rows, width, touched rows


def cases(device: torch.device) -> Iterator[Case]:
    for model, count in SIZES[device.type].items():
        yield _dense(f"adamw, {model}, one gradient", 1, count, device)
        yield _dense(f"adamw, {model}, w J and bf16 copy", TASKS, count, device)
    for rows, width, touched in TABLES[device.type]:
        yield _by_rows(rows, width, touched, device)


def _fused(count: int, device: torch.device) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(draw(count, dtype=torch.float32, device=device))
    parameter.grad = draw(count, dtype=torch.float32, device=device)
    capturable = device.type == "cuda"
    return parameter, torch.optim.AdamW([parameter], lr=1e-5, weight_decay=0.01, fused=True, capturable=capturable)


def _step(J: Tensor, *shape: int, copy: bool = False, row_slot: Tensor | None = None) -> AdamWStep:
    p, m, v = (draw(*shape, dtype=torch.float32, device=J.device).abs() for _ in range(3))
    w = draw(J.shape[0], dtype=torch.float32, device=J.device) if J.shape[0] > 1 else None
    scalars = torch.tensor([1e-5, 10.0, 1.0, 0.0], device=J.device)
    image = torch.empty(shape, dtype=torch.bfloat16, device=J.device) if copy else None
    return AdamWStep(J, w, p, m, v, scalars, image, row_slot, weight_decay=0.01)


def _candidate(step: AdamWStep, gradient: Tensor, moved: int) -> Candidate:
    """Ours, with the step in fp64 on `gradient` as its check."""

    def check() -> None:
        m = 0.9 * step.m.double() + 0.1 * gradient
        v = 0.999 * step.v.double() + 0.001 * gradient.square()
        rate = 1e-5 * (1 - 0.999**10) ** 0.5 / (1 - 0.9**10)
        p = (step.p.double() - rate * m / (v.sqrt() + 1e-6)) * (1 - 1e-5 * 0.01)
        ops.adamw(step)
        for name, exact in (("p", p), ("m", m), ("v", v)):
            close(name, getattr(step, name), exact, torch.float32)

    return Candidate(lambda: ops.adamw(step), check, moved)


def _dense(name: str, tasks: int, count: int, device: torch.device) -> Case:
    J = draw(tasks, count, dtype=torch.float32, device=device)
    step = _step(J, count, copy=tasks > 1)
    parameter, optimizer = _fused(count, device)
    moved = (4 * tasks + 24 + 2 * (tasks > 1)) * count

    def apart() -> None:
        if step.w is not None and step.copy is not None and parameter.grad is not None:
            torch.mv(J.T, step.w, out=parameter.grad)
            optimizer.step()
            step.copy.copy_(parameter.detach())

    theirs = {"AdamW(fused)": optimizer.step} if step.w is None else {"torch.mv, AdamW(fused), copy": apart}
    gradient = (J[0] if step.w is None else step.w @ J).double()
    return Case(
        label(name, torch.float32, tasks, count),
        triton_too(_candidate(step, gradient, moved), J)
        | {each: Candidate(run, None, moved) for each, run in theirs.items()},
    )


def _by_rows(rows: int, width: int, touched: int, device: torch.device) -> Case:
    """A word embedding of which few rows have a gradient; torch's AdamW takes a dense one."""
    _, optimizer = _fused(rows * width, device)
    J = draw(TASKS, touched, width, dtype=torch.float32, device=device)
    places = torch.randperm(rows, device=device)[:touched].sort().values
    row_slot = torch.full((rows,), -1, dtype=torch.int32, device=device)
    row_slot[places] = torch.arange(touched, dtype=torch.int32, device=device)
    step = _step(J, rows, width, row_slot=row_slot)
    assert step.w is not None
    gradient = torch.zeros(rows, width, dtype=torch.float64, device=device)
    gradient[places] = torch.einsum("t,tuh->uh", step.w, J).double()
    moved = 24 * rows * width + 4 * J.numel()
    return Case(
        label("adamw by rows", torch.float32, rows, width),
        triton_too(_candidate(step, gradient, moved), J)
        | {"AdamW(fused), dense": Candidate(optimizer.step, None, 28 * rows * width)},
    )
