# SPDX-License-Identifier: Apache-2.0
"""adamw against fp64 and the course's optimizer, by every implementation: dense, row-sparse, clipped, skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minbert_fast import ops
from minbert_fast.ops import AdamWStep, backend
from minbert_fast.step import naive
from tests.surgery import oracles
from tests.tolerance import assert_within_budget
from tests.without_gpu import cuda_on_cpu

SETTINGS: dict[str, dict[str, Any]] = {
    "decay": {"weight_decay": 0.01},
    "uncorrected": {"correct_bias": False, "beta1": 0.5, "beta2": 0.9},
    "no first moment": {"beta1": 0.0, "beta2": 0.9},
    "slower block": {"weight_decay": 0.3, "lr_factor": 0.25},
}
#: A kind of step and J's dtype, which are independent of each other.
KINDS = list(zip(SETTINGS, [torch.float32, torch.bfloat16] * 2, strict=True))


def scalars(lr: float = 1e-2, step: int = 3, scale: float = 1.0, skip: float = 0.0) -> Tensor:
    return torch.tensor([lr, step, scale, skip])


def moments(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """p, m and v of a run under way."""
    generator = torch.Generator().manual_seed(seed)
    p, m, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return [p, m, v.abs()]


def shifted(tensors: Iterable[Tensor], offset: int = 1) -> list[Tensor]:
    """Copies that begin `offset` elements after an aligned address."""
    return [torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view_as(t) for t in tensors]


def check(step: AdamWStep, before: list[Tensor], J: Tensor) -> None:
    """Each of p, m, v after `step` within the budget of the same step in fp64 and in plain fp32; J [T, ...] is dense."""
    assert step.w is not None
    lr, number, scale, _ = step.scalars.double().tolist()
    constants: dict[str, Any] = {
        "lr": lr * step.lr_factor, "step": round(number), "betas": (step.beta1, step.beta2), "eps": step.eps,
        "weight_decay": step.weight_decay, "correct_bias": step.correct_bias,
    }  # fmt: skip
    results = []
    for dtype in (torch.float64, torch.float32):
        state = [t.cpu().to(dtype) for t in before]
        g = torch.tensordot(step.w.cpu().to(dtype), J.cpu().to(dtype), dims=1) * scale
        results.append(oracles.adamw(*state, g, **constants))
    for name, exact, plain in zip("pmv", *results, strict=True):
        assert_within_budget(getattr(step, name).cpu(), exact, plain, name=name)
    if step.copy is not None:  # Triton's interpreter truncates where a GPU rounds
        error = (step.copy.float() - step.p).abs()
        assert bool((error <= step.p.abs() * 2**-7).all())


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("columns", [0, 1, 15, 17, 1023, 1024, 1025, 16_385])
def test_dense(isa: str, columns: int, dtype: torch.dtype, kind: str) -> None:
    J = oracles.random_rows(3, columns, dtype, spare=3)
    before, copy = moments((columns,)), torch.full((columns,), torch.nan, dtype=torch.bfloat16)
    state = shifted(before)
    step = AdamWStep(J, torch.tensor([1.0, 0.5, -2.0]), *state, scalars(scale=0.7), copy, **SETTINGS[kind])
    ops.adamw(step)
    check(step, before, J)
    assert torch.equal(copy, step.p.bfloat16())


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(
    ("tasks", "columns", "offset", "shift"),
    [(1, 1, 0, 1), (2, 1024, 0, 1), (3, 5001, 0, 0), (4, 2000, 4, 4), (64, 503, 1, 0)],
)
def test_dense_by_every_implementation(
    anywhere: torch.device, tasks: int, columns: int, offset: int, shift: int, dtype: torch.dtype, kind: str
) -> None:
    """J begins `offset` elements after an aligned address, p, m and v `shift`, and the copy half as many."""
    J = oracles.random_rows(tasks, columns + 8, dtype).to(anywhere)[:, offset : offset + columns]
    w, numbers = torch.randn(tasks, device=anywhere), scalars(scale=0.7).to(anywhere)
    before = [t.to(anywhere) for t in moments((columns,))]
    copy = torch.full((columns,), torch.nan, dtype=torch.bfloat16, device=anywhere)
    step = AdamWStep(J, w, *shifted(before, shift), numbers, *shifted([copy], shift // 2), **SETTINGS[kind])
    ops.adamw(step)
    check(step, before, J)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize(("tasks", "width", "shift"), [(2, 1, 1), (2, 7, 0), (3, 64, 1), (2, 384, 0), (5, 1100, 0)])
def test_rows(anywhere: torch.device, tasks: int, width: int, shift: int, dtype: torch.dtype, kind: str) -> None:
    """A table of which few rows have a gradient takes exactly the dense step on the scattered gradient.

    J's rows are aligned, and p, m and v if `shift` is 0; then a width of 7 or 1,100 alone tells that rows of p are not.
    """
    vocabulary, slots = 40, 5
    J = (
        oracles.random_rows(tasks, slots * width, dtype, spare=8 + -slots * width % 8)
        .to(anywhere)
        .unflatten(1, (slots, width))
    )
    table = torch.full((vocabulary,), -1, dtype=torch.int32, device=anywhere)
    table[torch.tensor([3, 0, 39, 17, 20], device=anywhere)] = torch.arange(slots, dtype=torch.int32, device=anywhere)
    dense = torch.zeros(tasks, vocabulary, width, dtype=dtype, device=anywhere)
    dense[:, table >= 0] = J[:, table[table >= 0].long()]
    w, numbers = torch.linspace(1.0, -0.5, tasks, device=anywhere), scalars(scale=0.7).to(anywhere)
    before = [t.to(anywhere) for t in moments((vocabulary, width))]
    copies = torch.full((2, vocabulary, width), torch.nan, dtype=torch.bfloat16, device=anywhere)
    state, expected = shifted(before, shift), [t.clone() for t in before]
    step = AdamWStep(J, w, *state, numbers, copies[0], table, **SETTINGS[kind])
    ops.adamw(step)
    flat = [t.view(-1) for t in expected]
    ops.adamw(AdamWStep(dense.flatten(1), w, *flat, numbers, copies[1].view(-1), **SETTINGS[kind]))
    check(step, before, dense)
    assert all(map(torch.equal, state, expected))
    assert torch.equal(*copies)


def test_a_plain_gradient_needs_no_weights(anywhere: torch.device) -> None:
    g = oracles.random_rows(1, 333).to(anywhere)
    results = []
    for w in (None, torch.ones(1, device=anywhere)):
        state = [t.to(anywhere) for t in moments((333,))]
        ops.adamw(AdamWStep(g, w, *state, scalars().to(anywhere)))
        results.append(state)
    assert all(map(torch.equal, *results))


def test_weight_zero_hides_a_broken_row(anywhere: torch.device) -> None:
    J = oracles.random_rows(3, 1500).to(anywhere)
    J[1, 5:7] = torch.tensor([torch.nan, torch.inf])
    results = []
    for rows, w in ((J, [1.0, 0.0, -2.0]), (J[::2].contiguous(), [1.0, -2.0])):
        state = [t.to(anywhere) for t in moments((1500,))]
        ops.adamw(AdamWStep(rows, torch.tensor(w, device=anywhere), *state, scalars().to(anywhere)))
        results.append(state)
    assert all(map(torch.equal, *results))


def test_skipping_leaves_everything(anywhere: torch.device) -> None:
    J = torch.full((2, 100), torch.nan, device=anywhere)
    before = [t.to(anywhere) for t in moments((100,))]
    state, copy = [t.clone() for t in before], torch.full((100,), 5.0, dtype=torch.bfloat16, device=anywhere)
    ops.adamw(AdamWStep(J, torch.ones(2, device=anywhere), *state, scalars(skip=1).to(anywhere), copy))
    assert all(map(torch.equal, state, before))
    assert bool((copy == 5).all())


@pytest.mark.parametrize("step", [1, 2, 10, 299, 301, 5000, 10**6])
def test_bias_correction_at_any_step(anywhere: torch.device, step: int) -> None:
    """1 - beta^t must not cancel near t = 1, nor jump where Triton's formula for it changes."""
    p, m, v = (torch.full((4,), value, device=anywhere) for value in (0.0, 0.3, 0.04))
    ops.adamw(AdamWStep(torch.full((1, 4), 0.1, device=anywhere), None, p, m, v, scalars(1.0, step).to(anywhere)))
    moment, square = 0.9 * 0.3 + 0.1 * 0.1, 0.999 * 0.04 + 0.001 * 0.1**2
    first, second = 1 - 0.9**step, math.sqrt(1 - 0.999**step)
    wanted = -second / first * moment / (math.sqrt(square) + 1e-6)
    plain = backend.surgery_implementation(p) == "torch"  # its fp32 rounds beta, which costs 1 - beta^t up to 6e-5
    torch.testing.assert_close(p, torch.full_like(p, wanted), rtol=1e-4 if plain else 2e-6, atol=0)


def test_same_bits_for_any_number_of_threads(isa: str, threads: None) -> None:
    J, w = oracles.random_rows(5, 70_001), torch.randn(5, generator=torch.Generator().manual_seed(0))
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        state = moments((70_001,))
        ops.adamw(AdamWStep(J, w, *state, scalars()))
        results.append(state)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_follows_the_courses_optimizer(anywhere: torch.device, kind: str) -> None:
    """Twenty steps of a schedule."""
    s = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0, "correct_bias": True, **SETTINGS[kind]}
    start = torch.randn(200, generator=torch.Generator().manual_seed(0))
    theirs = nn.Parameter(start.double())
    optimizer = naive.AdamW([theirs], 0.0, (s["beta1"], s["beta2"]), s["eps"], s["weight_decay"], s["correct_bias"])
    p, m, v = start.to(anywhere), torch.zeros(200, device=anywhere), torch.zeros(200, device=anywhere)
    for step in range(1, 21):
        lr = 1e-2 / step
        J = oracles.random_rows(3, 200, seed=step)
        optimizer.param_groups[0]["lr"] = lr * s.get("lr_factor", 1.0)
        theirs.grad = J.double().sum(0)
        optimizer.step()
        ops.adamw(
            AdamWStep(
                J.to(anywhere),
                torch.ones(3, device=anywhere),
                p,
                m,
                v,
                scalars(lr, step).to(anywhere),
                **SETTINGS[kind],
            )
        )
    torch.testing.assert_close(p.cpu().double(), theirs.detach(), rtol=1e-5, atol=1e-6)


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
    ops.adamw(AdamWStep(gradient.view(1, -1), None, *expected, scalars()))
    ops.adamw(AdamWStep(J.view(tasks, slots, width), w, *state, scalars(), row_slot=table))
    for ours, theirs in zip(state, expected, strict=True):
        assert torch.equal(ours.view(-1), theirs)


def test_refusals(anywhere: torch.device) -> None:
    J, w, numbers = torch.zeros(2, 30, device=anywhere), torch.ones(2, device=anywhere), scalars().to(anywhere)
    p, m, v = (t.to(anywhere) for t in moments((30,)))
    good = AdamWStep(J, w, p, m, v, numbers)
    for change, message in [
        ({"w": None}, "w may be absent for one task only, and J has 2"),
        ({"p": p[:-1]}, r"p must have shape \[30\]"),
        ({"m": m[:-1]}, r"m must have shape \[30\]"),
        ({"v": v.double()}, "v must be float32"),
        ({"p": p.bfloat16()}, "p must be float32"),
        ({"m": p}, "must not share memory"),
        ({"p": J[0]}, "must not share memory"),
        ({"scalars": numbers[:3]}, r"scalars must have shape \[4\]"),
        ({"scalars": p[:4]}, "must not share memory"),
        ({"p": torch.zeros(60, device=anywhere)[::2]}, "p must be contiguous"),
        ({"copy": torch.zeros(30, device=anywhere)}, "copy must be bfloat16"),
        ({"beta1": 1.0}, "0 <= beta < 1"),
        ({"eps": -1.0}, "eps = -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay = nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.adamw(good._replace(**change))
    table = torch.tensor([0, 2, 1], dtype=torch.int32, device=anywhere)
    good = AdamWStep(J.view(2, 3, 10), w, *(t.view(3, 10) for t in (p, m, v)), numbers, row_slot=table)
    ops.adamw(good)
    for bad, message in [(table.long(), "row_slot must be int32"), (table[:2], r"row_slot must have shape \[3\]")]:
        with pytest.raises(ValueError, match=message):
            ops.adamw(good._replace(row_slot=bad))


def test_a_slot_that_is_not_there_is_refused_on_the_cpu() -> None:
    state = [t.view(3, 10) for t in moments((30,))]
    table = torch.tensor([0, 2, 1], dtype=torch.int32)
    for bad, value in ((table + 1, 3), (table - 2, -2)):
        with pytest.raises(ValueError, match=rf"row_slot holds {value}, which is not in \[-1, 3\)"):
            ops.adamw(AdamWStep(torch.zeros(2, 3, 10), torch.ones(2), *state, scalars(), row_slot=bad))


def test_a_slot_that_is_not_there_has_no_gradient_in_cuda() -> None:
    """A kernel cannot report it, and must not read beyond J's rows."""
    J = torch.full((2, 4, 10), torch.nan)
    J[:, :3] = 1
    results = []
    with cuda_on_cpu.running(cuda_on_cpu.NAME, J.device):
        for table in ([0, 3, -2], [0, -1, -1]):
            state = [t.view(3, 10) for t in moments((30,))]
            row_slot = torch.tensor(table, dtype=torch.int32)
            ops.adamw(AdamWStep(J[:, :3], torch.ones(2), *state, scalars(), row_slot=row_slot))
            results.append(state)
    assert all(map(torch.equal, *results))
