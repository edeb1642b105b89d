# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery: from J [T, P] to the combined gradient, and to updated parameters, ours and everyone else's.

Bytes a parameter that each op has to move, e bytes an element of J (4 for fp32, 2 for bf16):
    gram e T | combine e T + 4 | adamw e T + 24 (p, m, v read and written), + 2 with a bf16 copy
    surgery = gram + combine

torch.mv writes to memory that stays, as ours does: on a CPU it takes longer to allocate a result than to compute it.
TorchJD and the classic loop return new tensors.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import gradients, harness
from benchmarks.harness import Candidate, Ceilings, Row
from minbert_fast import ops, surgery
from minbert_fast.common import huge_pages
from minbert_fast.step import naive

TASKS = (2, 3, 8, 32)
# The classic loop walks over P twice for each pair of tasks: beyond this many products of pairs and parameters it would
# take minutes, and is left out.
CLASSIC_LIMIT = 64 * 120e6
timed = partial(harness.measure, seconds=4.0)  # there are many cases


def run(device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    """Every size and number of tasks that fits into memory, random gradients and a real step's, fp32 and bf16."""
    for model, parameters in gradients.PARAMETERS.items():
        for tasks in TASKS:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{model}, T={tasks}, {str(dtype).removeprefix('torch.')}, random"
                needed = parameters * (tasks * (dtype.itemsize + 4) + 40)  # J, a baseline's fp32 copy of it, the rest
                if needed > harness.available_bytes(device):
                    yield Row("surgery", name, "all", note=f"needs {needed / 1e9:.0f} GB: left out")
                    continue
                J = gradients.random_gradients(tasks, parameters, device, dtype)
                yield from _cases(name, J, device, ceilings)
                del J
                gc.collect()
        J = gradients.real_gradients(model, device)
        yield from _cases(f"{model}, T=3, float32, a real step's", J, device, ceilings)
        del J
        gc.collect()


def _cases(name: str, J: Tensor, device: torch.device, ceilings: Ceilings) -> Iterator[Row]:
    for op, make in (("gram", _gram), ("combine", _combine), ("surgery", _surgery), ("combine + AdamW", _step)):
        ways = make(J)
        baselines = [way for way in ways if way != "ours"]
        yield from harness.case("surgery", f"{name}: {op}", ways, device, ceilings, timer=timed, baselines=baselines)


def _gram(J: Tensor) -> dict[str, Candidate]:
    out = torch.empty(len(J), len(J), device=J.device)
    moved = J.numel() * J.element_size()

    def product() -> Tensor:
        return (J @ J.T).float()

    def check() -> None:
        torch.testing.assert_close(ops.gram(J, out), _exact_gram(J), rtol=1e-4, atol=1e-5 * float(out.max()))

    return {
        "ours": Candidate(lambda: ops.gram(J, out), check, moved),
        "J @ J.T": Candidate(product, None, moved),
    }


def _combine(J: Tensor) -> dict[str, Candidate]:
    w = torch.linspace(0.5, 1.5, len(J), device=J.device)
    out = huge_pages.zeros(J.shape[1], device=J.device)
    moved = J.numel() * J.element_size() + 4 * J.shape[1]
    low, theirs = w.to(J.dtype), torch.empty_like(J[0])

    def check() -> None:
        exact = _sample(J).double().T @ w.double()
        torch.testing.assert_close(_sample(ops.combine(J, w, out)), exact.float(), rtol=1e-4, atol=1e-7)

    return {
        "ours": Candidate(lambda: ops.combine(J, w, out), check, moved),
        "torch.mv": Candidate(lambda: torch.mv(J.T, low, out=theirs), None, moved),
    }


def _surgery(J: Tensor) -> dict[str, Candidate]:
    """PCGrad's combined gradient, all in the same task orders where the method lets us choose them."""
    tasks, device = len(J), J.device
    order = surgery.task_orders(tasks, torch.Generator().manual_seed(0))
    on_device, orders = order.to(device), order.tolist()
    out, theirs = huge_pages.zeros(J.shape[1], device=device), torch.empty_like(J[0])
    exact: dict[str, Tensor] = {}

    def ours() -> Tensor:
        w, _ = ops.pcgrad_weights(ops.gram(J), on_device)
        return ops.combine(J, w, out)

    def products() -> Tensor:
        w, _ = ops.pcgrad_weights((J @ J.T).float(), on_device)
        return torch.mv(J.T, w.to(J.dtype), out=theirs)

    def classic() -> Tensor:
        return naive.pcgrad(list(J), orders)

    def check() -> None:
        exact["w"], _ = ops.pcgrad_weights(_exact_gram(J), on_device)
        expected = _sample(J).double().T @ exact["w"].double()
        torch.testing.assert_close(_sample(ours()).double(), expected, rtol=1e-3, atol=1e-6)

    moved = 2 * J.numel() * J.element_size() + 4 * J.shape[1]
    candidates = {
        "ours": Candidate(ours, check, moved),
        "J @ J.T, torch.mv": Candidate(products, None, moved),
    }
    try:
        from torchjd.aggregation import PCGrad

        aggregator = PCGrad()
        candidates["TorchJD PCGrad"] = Candidate(lambda: aggregator(J), None, moved)
    except ImportError:
        pass
    if tasks * tasks * J.shape[1] <= CLASSIC_LIMIT and J.dtype == torch.float32:
        candidates["classic loop"] = Candidate(classic, None, moved)
    return candidates


def _step(J: Tensor) -> dict[str, Candidate]:
    """From J and w to new parameters. The baseline's fused AdamW is timed alone too, on a gradient that lies ready."""
    device, parameters = J.device, J.shape[1]
    w = torch.ones(len(J), device=device)
    p, m, v = (huge_pages.zeros(parameters, device=device) for _ in range(3))
    step = ops.AdamWStep(J, w, p, m, v, torch.tensor([1e-5, 10.0, 1.0, 0.0], device=device), weight_decay=0.01)
    theirs = torch.nn.Parameter(huge_pages.zeros(parameters, device=device))
    gradient = huge_pages.zeros(parameters, device=device).fill_(1)
    theirs.grad = gradient
    fused = torch.optim.AdamW([theirs], lr=1e-5, fused=True)
    low, combined = w.to(J.dtype), gradient if J.dtype == torch.float32 else torch.empty_like(J[0])

    def combined_first() -> None:
        gradient.copy_(torch.mv(J.T, low, out=combined))  # onto itself in fp32: nothing
        fused.step()

    def check() -> None:
        p.zero_(), m.zero_(), v.zero_()
        ops.adamw(step)
        sampled = _sample(J).double().T
        g = sampled @ w.double()
        rounding = 1e-6 * (sampled.abs() @ w.double())  # of an fp32 sum whose terms may cancel
        _check_error(_sample(m) - 0.1 * g, 0.1 * rounding)
        size = 1e-5 * (1 - 0.999**10) ** 0.5 / (1 - 0.9**10)
        change = size * 0.1 * g / ((0.001 * g * g).sqrt() + step.eps)  # its slope is greatest at g = 0: 0.1 size / eps
        _check_error(_sample(p) + change * (1 - 1e-5 * 0.01), 1e-3 * change.abs() + 0.1 * size / step.eps * rounding)

    moved = J.numel() * J.element_size() + 24 * parameters
    return {
        "ours": Candidate(lambda: ops.adamw(step), check, moved),
        "torch.mv, AdamW(fused)": Candidate(combined_first, None, moved),
        "AdamW(fused) alone": Candidate(fused.step, None, 28 * parameters),
    }


def _check_error(error: Tensor, allowed: Tensor) -> None:
    worst = float((error.abs() / allowed.clamp(min=1e-30)).max())
    assert worst <= 1, f"an error is {worst:.2g} times what rounding explains"


def _exact_gram(J: Tensor) -> Tensor:
    """fp64 sums, a piece of J at a time."""
    total = torch.zeros(len(J), len(J), dtype=torch.float64, device=J.device)
    for piece in J.split(1 << 20, dim=1):
        total += piece.double() @ piece.double().T
    return total.float()


def _sample(x: Tensor) -> Tensor:
    """The first and last million columns: what a check looks at."""
    count = min(1_000_000, x.shape[-1])
    return torch.cat([x[..., :count], x[..., -count:]], dim=-1)
