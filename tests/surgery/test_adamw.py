# SPDX-License-Identifier: Apache-2.0
"""combine_adamw against fp64, the course's optimizer and torch's: dense, row-sparse, clipped, skipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minbert_fast.ops import surgery as ops
from minbert_fast.ops.backend import Implementation, force
from minbert_fast.ops.surgery import AdamWSettings
from minbert_fast.step import naive
from tests.surgery import oracles
from tests.tolerance import assert_within_budget

IMPLEMENTATIONS: list[Implementation] = ["native", "torch"]
SETTINGS = {
    "course": AdamWSettings(weight_decay=0.01),
    "course, uncorrected": AdamWSettings(correct_bias=False, betas=(0.5, 0.9)),
    "course, slower block": AdamWSettings(weight_decay=0.3, lr_factor=0.25),
    "torch": AdamWSettings(weight_decay=0.01, style="torch", eps=1e-8),
}


def scalars(lr: float = 1e-2, step: int = 3, scale: float = 1.0, skip: float = 0.0) -> Tensor:
    return torch.tensor([lr, step, scale, skip])


def moments(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """p, m and v of a run under way, on an allocation that is not aligned to anything but an element."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    p, m, v = (torch.randn(size + 1, generator=generator)[1:].view(shape) for _ in range(3))
    return [p, m, v.abs()]


def check(got: list[Tensor], before: list[Tensor], J: Tensor, w: Tensor, s: AdamWSettings, numbers: Tensor) -> None:
    """Each of p, m, v within the budget of the same step in fp64 and in plain fp32."""
    lr, step, scale, _ = numbers.double().tolist()
    constants: dict[str, Any] = {
        "lr": lr * s.lr_factor, "step": round(step), "betas": s.betas, "eps": s.eps,
        "weight_decay": s.weight_decay, "correct_bias": s.correct_bias, "style": s.style,
    }  # fmt: skip
    results = []
    for dtype in (torch.float64, torch.float32):
        state = [t.cpu().to(dtype) for t in before]
        g = torch.tensordot(w.cpu().to(dtype), J.cpu().to(dtype), dims=1) * scale
        results.append(oracles.adamw(*state, g, **constants))
    for name, actual, exact, plain in zip("pmv", got, *results, strict=True):
        assert_within_budget(actual.cpu(), exact, plain, name=name)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [0, 1, 15, 17, 1023, 1024, 1025, 16_385])
def test_dense(isa: str, columns: int, dtype: torch.dtype, kind: str) -> None:
    J = oracles.random_rows(3, columns, dtype, spare=3)
    w, numbers = torch.tensor([1.0, 0.5, -2.0]), scalars(scale=0.7)
    before = moments((columns,))
    state = [t.clone() for t in before]
    copy = torch.full((columns,), torch.nan, dtype=torch.bfloat16)
    ops.combine_adamw(J, w, *state, numbers, SETTINGS[kind], copy)
    check(state, before, J, w, SETTINGS[kind], numbers)
    assert torch.equal(copy, state[0].bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tasks", "columns", "offset"), [(1, 1, 0), (2, 1024, 0), (3, 100_003, 0), (4, 50_000, 4), (64, 5003, 1)]
)
def test_dense_cuda(tasks: int, columns: int, offset: int, dtype: torch.dtype, kind: str) -> None:
    J = oracles.random_rows(tasks, columns + 8, dtype).cuda()[:, offset : offset + columns]
    w, numbers = torch.randn(tasks, device="cuda"), scalars(scale=0.7)
    before = [t.cuda() for t in moments((columns,))]
    state = [t.clone() for t in before]
    copy = torch.full((columns,), torch.nan, dtype=torch.bfloat16, device="cuda")
    ops.combine_adamw(J, w, *state, numbers.cuda(), SETTINGS[kind], copy)
    check(state, before, J, w, SETTINGS[kind], numbers)
    assert torch.equal(copy, state[0].bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 64, 1100])
def test_rows(device: torch.device, width: int, dtype: torch.dtype, kind: str, implementation: Implementation) -> None:
    """A table of which few rows have a gradient takes exactly the dense step on the scattered gradient."""
    vocabulary, slots = 40, 5
    J = oracles.random_rows(2, slots * width, dtype, spare=8).to(device)
    table = torch.full((vocabulary,), -1, dtype=torch.int32, device=device)
    table[torch.tensor([3, 0, 39, 17, 20], device=device)] = torch.arange(slots, dtype=torch.int32, device=device)
    dense = torch.zeros(2, vocabulary, width, dtype=dtype, device=device)
    dense[:, table >= 0] = J.unflatten(1, (slots, width))[:, table[table >= 0].long()]
    w, numbers = torch.tensor([1.0, -0.5], device=device), scalars(scale=0.7)
    before = [t.to(device) for t in moments((vocabulary, width))]
    state, expected = [t.clone() for t in before], [t.clone() for t in before]
    copy = torch.full((vocabulary, width), torch.nan, dtype=torch.bfloat16, device=device)
    with force(implementation):
        gradients = J.unflatten(1, (slots, width))
        ops.combine_adamw_rows(gradients, w, table, *state, numbers.to(device), SETTINGS[kind], copy)
        flat = [t.view(-1) for t in expected]
        ops.combine_adamw(dense.flatten(1), w, *flat, numbers.to(device), SETTINGS[kind])
    check(state, before, dense, w, SETTINGS[kind], numbers)
    assert all(map(torch.equal, state, expected))
    assert torch.equal(copy, state[0].bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_plain_gradient_needs_no_weights(device: torch.device, implementation: Implementation) -> None:
    g = oracles.random_rows(1, 333).to(device)
    results = []
    for w in (None, torch.ones(1, device=device)):
        state = [t.to(device) for t in moments((333,))]
        with force(implementation):
            ops.combine_adamw(g, w, *state, scalars().to(device), SETTINGS["course"])
        results.append(state)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_skipping_leaves_everything(device: torch.device, implementation: Implementation) -> None:
    J = torch.full((2, 100), torch.nan, device=device)
    before = [t.to(device) for t in moments((100,))]
    state, copy = [t.clone() for t in before], torch.full((100,), 5.0, dtype=torch.bfloat16, device=device)
    with force(implementation):
        ops.combine_adamw(J, torch.ones(2, device=device), *state, scalars(skip=1).to(device), SETTINGS["torch"], copy)
    assert all(map(torch.equal, state, before))
    assert bool((copy == 5).all())


def test_same_bits_for_any_number_of_threads(isa: str, threads: None) -> None:
    J, w = oracles.random_rows(5, 70_001), torch.randn(5, generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        state = moments((70_001,))
        ops.combine_adamw(J, w, *state, scalars(), SETTINGS["course"])
        results.append(state)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_follows_the_optimizer_it_imitates(kind: str) -> None:
    """Fifty steps of a schedule: the parameters stay those of the course's or torch's own AdamW."""
    s = SETTINGS[kind]
    start = torch.randn(200, generator=torch.Generator().manual_seed(0))
    theirs = nn.Parameter(start.double())
    optimizer: torch.optim.Optimizer
    if s.style == "torch":
        optimizer = torch.optim.AdamW([theirs], betas=s.betas, eps=s.eps, weight_decay=s.weight_decay)
    else:
        optimizer = naive.AdamW([theirs], 0.0, s.betas, s.eps, s.weight_decay, s.correct_bias)
    p, m, v = start.clone(), torch.zeros(200), torch.zeros(200)
    for step in range(1, 51):
        lr = 1e-2 / step
        J = oracles.random_rows(3, 200, seed=step)
        optimizer.param_groups[0]["lr"] = lr * s.lr_factor
        theirs.grad = J.double().sum(0)
        optimizer.step()
        ops.combine_adamw(J, torch.ones(3), p, m, v, scalars(lr, step), s)
    torch.testing.assert_close(p.double(), theirs.detach(), rtol=1e-5, atol=1e-6)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape_of_table(data: st.DataObject) -> None:
    tasks, rows, width = (data.draw(st.integers(low, 12)) for low in (1, 0, 1))
    slots = data.draw(st.integers(0, rows))
    J = oracles.random_rows(tasks, slots * width, data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    table = torch.full((rows,), -1, dtype=torch.int32)
    table[torch.randperm(rows)[:slots]] = torch.arange(slots, dtype=torch.int32)
    w, state = torch.randn(tasks), moments((rows, width))
    gradient = torch.zeros(rows, width)
    gradient[table >= 0] = ops.combine(J, w).view(slots, width)[table[table >= 0].long()]
    expected = [t.clone().view(-1) for t in state]
    ops.combine_adamw(gradient.view(1, -1), None, *expected, scalars(), SETTINGS["course"])
    ops.combine_adamw_rows(J.view(tasks, slots, width), w, table, *state, scalars(), SETTINGS["course"])
    for ours, theirs in zip(state, expected, strict=True):
        assert torch.equal(ours.view(-1), theirs)


def test_refusals() -> None:
    J, w, numbers = torch.zeros(2, 30), torch.ones(2), scalars()
    p, m, v = moments((30,))
    course = SETTINGS["course"]
    for arguments, message in [
        ((J, None, p, m, v, numbers), "w may be absent for one task only, and J has 2"),
        ((J, w, p[:-1], m, v, numbers), r"p must have shape \[30\]"),
        ((J, w, p, m[:-1], v, numbers), r"m must have shape \[30\]"),
        ((J, w, p, m, v.double(), numbers), "v must be float32"),
        ((J, w, p.bfloat16(), m, v, numbers), "p must be float32"),
        ((J, w, p, p, v, numbers), "must not share memory"),
        ((J, w, J[0], m, v, numbers), "must not share memory"),
        ((J, w, p, m, v, numbers[:3]), r"scalars must have shape \[4\]"),
        ((J, w, p, m, v, p[:4]), "must not share memory"),
        ((J, w, torch.zeros(60)[::2], m, v, numbers), "p must be contiguous"),
    ]:
        for implementation in IMPLEMENTATIONS:
            with force(implementation), pytest.raises(ValueError, match=message):
                ops.combine_adamw(*arguments, course)
    with pytest.raises(ValueError, match="copy must be bfloat16"):
        ops.combine_adamw(J, w, p, m, v, numbers, course, torch.zeros(30))
    rows, table = J.view(2, 3, 10), torch.tensor([0, 2, 1], dtype=torch.int32)
    state = [t.view(3, 10) for t in (p, m, v)]
    for bad, message in [
        (table.long(), "row_slot must be int32"),
        (table[:2], r"row_slot must have shape \[3\]"),
        (table + 1, r"row_slot holds 3, which is not in \[-1, 3\)"),
        (table - 2, r"row_slot holds -2, which is not in \[-1, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.combine_adamw_rows(rows, w, bad, *state, numbers, course)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (1.0, 0.9)}, "0 <= beta < 1"),
        ({"eps": -1.0}, "eps = -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay = nan"),
        ({"style": "keras"}, 'expected "course" or "torch"'),
        ({"style": "torch", "correct_bias": False}, "always corrects the bias"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(AdamWSettings(), **change)
