# SPDX-License-Identifier: Apache-2.0
"""adamw: the Triton step against torch's fused one and against the extension's; on a CPU the surgery suite times ours.

Bytes a parameter: p, m, v read and written 24, a gradient 4, J of T tasks 4 T, the bf16 copy 2. By rows, an
untouched row has no gradient to read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.harness import Candidate
from benchmarks.kernels.case import TASKS, Case, close, draw, label
from minbert_fast.ops import surgery as ops
from minbert_fast.ops.surgery import AdamWSettings

PARAMETERS = {"MiniLM-L6": 22_713_216, "BERT-base": 109_482_240}
VOCABULARY, TOUCHED = 30522, 1000


def cases(device: torch.device) -> Iterator[Case]:
    if device.type != "cuda":
        return
    for model, count in PARAMETERS.items():
        yield _dense(model, count, device)
        yield _combined(model, count, device)
    yield _by_rows(768, device)


def _fused(count: int, device: torch.device) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(draw(count, dtype=torch.float32, device=device))
    parameter.grad = draw(count, dtype=torch.float32, device=device)
    return parameter, torch.optim.AdamW([parameter], lr=1e-5, weight_decay=0.01, fused=True, capturable=True)


def _dense(model: str, count: int, device: torch.device) -> Case:
    """A plain gradient, torch's own formula on both sides."""
    from minbert_fast.kernels import adamw as kernels

    theirs, optimizer = _fused(count, device)
    p, m, v = theirs.detach().clone(), torch.zeros(count, device=device), torch.zeros(count, device=device)
    assert theirs.grad is not None
    gradient = theirs.grad[None]
    scalars = torch.tensor([1e-5, 1.0, 1.0, 0.0], device=device)
    options = kernels.Options(eps=1e-8, weight_decay=0.01, torch_style=True)

    def ours() -> None:
        kernels.adamw(p, m, v, gradient, None, None, scalars, options)

    def check() -> None:
        before = p.clone()
        ours()
        optimizer.step()
        close("step", p - before, theirs.detach() - before, torch.bfloat16)
        close("p", p, theirs.detach(), torch.float32)

    return Case(
        label(f"adamw, {model}, one gradient", torch.float32, count),
        {"ours": Candidate(ours, check, 28 * count), "AdamW(fused)": Candidate(optimizer.step, None, 28 * count)},
    )


def _combined(model: str, count: int, device: torch.device) -> Case:
    """w J and the step in one pass, with the bf16 copy."""
    from minbert_fast.kernels import adamw as kernels

    j = draw(TASKS, count, dtype=torch.float32, device=device)
    w = draw(TASKS, dtype=torch.float32, device=device)
    p, m, v = (torch.zeros(count, device=device) for _ in range(3))
    copy = torch.empty(count, dtype=torch.bfloat16, device=device)
    scalars = torch.tensor([1e-5, 10.0, 1.0, 0.0], device=device)
    _, optimizer = _fused(count, device)
    parameter = optimizer.param_groups[0]["params"][0]

    def ours() -> None:
        kernels.adamw(p, m, v, j, w, copy, scalars, kernels.Options(weight_decay=0.01))

    def extension() -> None:
        ops.combine_adamw(j, w, p, m, v, scalars, AdamWSettings(weight_decay=0.01), copy)

    def apart() -> None:
        parameter.grad.copy_(torch.mv(j.T, w))
        optimizer.step()
        copy.copy_(parameter.detach())

    def check() -> None:
        for t in (p, m, v):
            t.zero_()
        ours()
        close("m", m, 0.1 * (w.double() @ j.double()), torch.float32)

    moved = (4 * TASKS + 24 + 2) * count
    return Case(
        label(f"adamw, {model}, w J and bf16 copy", torch.float32, TASKS, count),
        {
            "ours": Candidate(ours, check, moved),
            "extension": Candidate(extension, None, moved),
            "torch.mv, AdamW(fused), copy": Candidate(apart, None, moved),
        },
    )


def _by_rows(width: int, device: torch.device) -> Case:
    """The word embedding, of which a thousand rows have a gradient; torch's takes a dense one."""
    from minbert_fast.kernels import adamw as kernels

    count = VOCABULARY * width
    _, optimizer = _fused(count, device)
    p, m, v = (draw(VOCABULARY, width, dtype=torch.float32, device=device).abs() for _ in range(3))
    touched = torch.randperm(VOCABULARY, device=device)[:TOUCHED].sort().values
    row_slot = torch.full((VOCABULARY,), -1, dtype=torch.int32, device=device)
    row_slot[touched] = torch.arange(TOUCHED, dtype=torch.int32, device=device)
    j = draw(TASKS, TOUCHED, width, dtype=torch.float32, device=device)
    w = draw(TASKS, dtype=torch.float32, device=device)
    scalars = torch.tensor([1e-5, 10.0, 1.0, 0.0], device=device)

    def ours() -> None:
        kernels.adamw_rows(p, m, v, row_slot, j, w, None, scalars, kernels.Options(weight_decay=0.01))

    def check() -> None:
        wanted = 0.9 * m.double()
        wanted[touched] += 0.1 * torch.einsum("t,tuh->uh", w.double(), j.double())
        ours()
        close("m", m, wanted, torch.float32)

    moved = 24 * count + 4 * j.numel()
    return Case(
        label("adamw by rows", torch.float32, VOCABULARY, width),
        {"ours": Candidate(ours, check, moved), "AdamW(fused), dense": Candidate(optimizer.step, None, 28 * count)},
    )
