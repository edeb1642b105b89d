# SPDX-License-Identifier: Apache-2.0
"""From G to w: PCGrad against whole-vector loops in fp64, the other methods against their definitions and TorchJD."""

from __future__ import annotations

import doctest
import itertools
import sys
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert_fast import ops, surgery
from minbert_fast.surgery import (
    aligned_mtl,
    cagrad,
    gradvac,
    imtl_g,
    mgda,
    nash_mtl,
    none,
    pcgrad,
    solvers,
    torchjd,
    upgrad,
)
from minbert_fast.surgery.base import Array, OnHost
from tests.surgery import oracles
from tests.without_gpu import cuda_on_cpu

IMPLEMENTATIONS = ["native", "torch", cuda_on_cpu.NAME]


def rows(tasks: int, kind: str) -> Tensor:
    """T gradients over 50 parameters of one awkward kind."""
    J = oracles.random_rows(tasks, 50, seed=tasks)
    if kind == "collinear":
        J = torch.linspace(0.5, 2.0, tasks)[:, None] * J[:1]
    elif kind == "opposite":
        J = torch.tensor([(-1.0) ** t * (t + 1) for t in range(tasks)])[:, None] * J[:1]
    elif kind == "nearly opposite":
        J = torch.tensor([(-1.0) ** t for t in range(tasks)])[:, None] * (J[:1] + 0.1 * J)
    elif kind == "some zero":
        J[::2] = 0
    elif kind == "all zero":
        J = torch.zeros_like(J)
    elif kind == "huge and tiny":
        J *= torch.logspace(-9, 9, tasks)[:, None]
    else:
        assert kind == "random"
    return J


KINDS = ["random", "collinear", "opposite", "nearly opposite", "some zero", "all zero", "huge and tiny"]


def orders(tasks: int, seed: int = 0) -> Tensor:
    return surgery.task_orders(tasks, torch.Generator().manual_seed(seed))


def close_combination(w: Tensor, J: Tensor, expected: Tensor) -> None:
    """w J against a vector, as closely as an fp32 G lets its projections be known."""
    scale = J.double().norm(dim=1).max()
    torch.testing.assert_close(w.double() @ J.double(), expected, rtol=1e-4, atol=1e-5 * float(scale) + 1e-30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tasks", "kind"), [*itertools.product(range(1, 9), KINDS), (64, "random")])
def test_pcgrad_is_the_naive_loop(hardware: torch.device, tasks: int, kind: str, implementation: str) -> None:
    J = rows(tasks, kind)
    for seed in range(4):
        order, mean = orders(tasks, seed), seed % 2 == 1
        with cuda_on_cpu.running(implementation, hardware):
            gram = (J.double() @ J.double().T).float().to(hardware)
            w, nonfinite = ops.pcgrad_weights(gram, order.to(hardware), mean)
        assert not nonfinite.any()
        close_combination(w.cpu(), J, oracles.pcgrad(J, order.tolist(), mean))


@given(st.integers(2, 8), st.integers(0, 1000), st.floats(-1, 1))
@settings(max_examples=50, deadline=None)
def test_pcgrad_of_any_gradients(tasks: int, seed: int, lean: float) -> None:
    J = oracles.random_rows(tasks, 20, seed=seed) + lean * torch.linspace(-1, 1, tasks)[:, None]
    order = orders(tasks, seed)
    results = []
    for implementation in IMPLEMENTATIONS:
        with cuda_on_cpu.running(implementation, J.device):
            w, _ = ops.pcgrad_weights(ops.gram(J), order)
        results.append(w)
        close_combination(w, J, oracles.pcgrad(J, order.tolist()))
    for w in results[1:]:
        torch.testing.assert_close(w, results[0], rtol=1e-4, atol=1e-4)


def test_pcgrad_is_torchjds(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = rows(6, "nearly opposite")
    gram, order = ops.gram(J), orders(6)
    permutations = iter(order)
    monkeypatch.setattr(torch, "randperm", lambda n: next(permutations).long())
    theirs = aggregation.PCGradWeighting()(gram)
    w, _ = ops.pcgrad_weights(gram, order)
    torch.testing.assert_close(w, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
def test_the_classic_loop_is_the_naive_one(hardware: torch.device, tasks: int, kind: str) -> None:
    J = rows(tasks, kind)
    gram = (J.double() @ J.double().T).float().to(hardware)
    for seed in range(4):
        method = pcgrad.ClassicProjections("sum", torch.Generator().manual_seed(seed))
        close_combination(method(gram).cpu(), J, oracles.pcgrad(J, orders(tasks, seed).tolist(), own=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_classic_loop_compares_a_gradient_with_its_own_original(implementation: str) -> None:
    """After two projections, task 0's gradient points against what it was: the paper's loop never looks there."""
    angles = torch.tensor([0.0, 170.0, 250.0]).deg2rad()
    J = torch.stack([angles.cos(), angles.sin()], 1)
    order = torch.tensor([[1, 2, 0], [1, 0, 2], [2, 0, 1]], dtype=torch.int32)
    gram = J @ J.T
    with cuda_on_cpu.running(implementation, gram.device):
        paper = pcgrad.Projections().project(gram, order)
    classic = pcgrad.ClassicProjections().project(gram, order)
    close_combination(paper, J, oracles.pcgrad(J, order.tolist()))
    close_combination(classic, J, oracles.pcgrad(J, order.tolist(), own=True))
    assert not torch.allclose(paper @ J, classic @ J, rtol=1e-2)


EXAMPLES = [none, pcgrad, upgrad, mgda, cagrad, aligned_mtl, gradvac, imtl_g, nash_mtl, torchjd]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_in_the_docstrings(module: ModuleType) -> None:
    if module is torchjd:
        pytest.importorskip("torchjd.aggregation")
    results = doctest.testmod(module, extraglobs={"np": np, "torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_broken_tasks_are_reported_and_left_out(hardware: torch.device, bad: float, implementation: str) -> None:
    """1e30 is finite, but its square is not."""
    J = rows(5, "nearly opposite")
    J[3, 7] = bad
    order = orders(5)
    with cuda_on_cpu.running(implementation, hardware):
        w, nonfinite = ops.pcgrad_weights(ops.gram(J.to(hardware)), order.to(hardware))
    assert nonfinite.tolist() == [0, 0, 0, 1, 0]
    assert w[3] == 0
    others = [0, 1, 2, 4]
    remaining = [[others.index(j) for j in order[i].tolist() if j != 3] for i in others]
    close_combination(w[others].cpu(), J[others], oracles.pcgrad(J[others], remaining))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("method", surgery.METHODS)
def test_every_method_leaves_broken_tasks_out(method: str, bad: float) -> None:
    """1e30 is finite, but its square is not."""
    J = rows(4, "random")
    J[1] = bad
    others = [0, 2, 3]
    w = surgery.weights(method, "sum", torch.Generator().manual_seed(0))(ops.gram(J))
    assert w[1] == 0
    if method not in ("pcgrad", "gradvac"):  # whose random orders differ with the number of tasks
        healthy = surgery.weights(method, "sum")(ops.gram(J[others]))
        torch.testing.assert_close(w[others], healthy, rtol=1e-4, atol=1e-5)
    assert surgery.weights(method)(torch.full((2, 2), torch.nan)).tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("method", surgery.METHODS)
def test_every_method_on_awkward_gradients(method: str, tasks: int, kind: str) -> None:
    gram = ops.gram(rows(tasks, kind))
    total = surgery.weights(method, "sum", torch.Generator().manual_seed(3))(gram)
    mean = surgery.weights(method, "mean", torch.Generator().manual_seed(3))(gram)
    assert total.shape == (tasks,)
    assert total.dtype == gram.dtype
    assert total.isfinite().all()
    torch.testing.assert_close(total, tasks * mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", surgery.METHODS)
def test_a_factor_on_all_gradients_changes_no_weight(method: str) -> None:
    """Losses times 1,000, or divided by it."""
    gram = ops.gram(rows(4, "random"))
    one, large, small = (
        surgery.weights(method, "sum", torch.Generator().manual_seed(3))(gram * factor) for factor in (1.0, 1e6, 1e-6)
    )
    torch.testing.assert_close(large, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", surgery.METHODS)
def test_a_gram_matrix_in_double_precision(method: str) -> None:
    """Named after the bug: PCGrad alone refused it."""
    gram = ops.gram(rows(3, "random"))
    single, double = (
        surgery.weights(method, "sum", torch.Generator().manual_seed(3))(g) for g in (gram, gram.double())
    )
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)


@pytest.mark.parametrize("present", [1, 2, 4])
@pytest.mark.parametrize("method", surgery.METHODS)
def test_tasks_without_examples_do_not_stop_the_others(method: str, present: int) -> None:
    """Named after the bug: MGDA and CAGrad took such a task's gradient, zero, for the one to follow."""
    J = rows(present + 2, "random")
    J[1] = J[-1] = 0
    w = surgery.weights(method, "sum", torch.Generator().manual_seed(0))(ops.gram(J))
    others = [i for i in range(len(J)) if J[i].any()]
    assert (J[others] @ (w @ J)).min() > 0


@pytest.mark.parametrize("method", surgery.METHODS)
def test_tasks_without_examples_do_not_lengthen_the_gradient_of_the_others(method: str) -> None:
    """Named after the bug: a step of one task out of three was three times as long under MGDA and IMTL-G."""
    J = rows(2, "random")
    among = torch.stack([J[0], torch.zeros_like(J[0]), J[1], torch.zeros_like(J[0])])
    make = partial(surgery.weights, method, "sum", torch.Generator().manual_seed(0))
    torch.testing.assert_close(make()(ops.gram(among))[[0, 2]], make()(ops.gram(J)), rtol=1e-4, atol=1e-5)


def random_gram(tasks: int, rank: int, seed: int) -> Array:
    J = np.random.default_rng(seed).standard_normal((tasks, rank))
    gram: Array = J @ J.T
    return gram / gram.diagonal().max()


CASES = [(tasks, rank, seed) for tasks in (1, 2, 3, 5, 8) for rank in (1, 2, 4, 20) for seed in range(3)]


@pytest.mark.parametrize(("tasks", "rank", "seed"), [*CASES, (32, 100, 0), (64, 40, 0)])
def test_nonnegative_least_squares(tasks: int, rank: int, seed: int) -> None:
    """Optimality itself: no slope upwards anywhere, and none at all where z > 0."""
    gram, linear = random_gram(tasks, rank, seed), -random_gram(tasks, rank, seed)[0]
    z = solvers.nonnegative(gram, linear)
    slope = gram @ z - linear
    assert (z >= 0).all()
    assert slope.min() > -1e-9
    assert np.abs(z * slope).max() < 1e-9


@pytest.mark.parametrize(("tasks", "rank", "seed"), CASES)
def test_upgrad_helps_every_task(tasks: int, rank: int, seed: int) -> None:
    gram = random_gram(tasks, rank, seed)
    assert (gram @ upgrad.weights(gram)).min() > -1e-9


@pytest.mark.parametrize(("tasks", "rank", "seed"), CASES)
def test_mgda_is_the_shortest_combination(tasks: int, rank: int, seed: int) -> None:
    gram = random_gram(tasks, rank, seed)
    a = mgda.weights(gram)
    assert a.min() >= 0
    assert a.sum() == pytest.approx(1)
    assert (gram @ a).min() >= a @ gram @ a - 1e-9  # no vertex is a way down


@pytest.mark.parametrize(("tasks", "rank", "seed"), CASES)
def test_cagrad_against_a_general_solver(tasks: int, rank: int, seed: int) -> None:
    """The primal problem: no d within c |g| of the mean serves the worst task better."""
    optimize = pytest.importorskip("scipy.optimize")
    gram, c = random_gram(tasks, rank, seed), 0.5
    mean = np.full(tasks, 1 / tasks)
    radius = c * np.sqrt(mean @ gram @ mean)

    def dual(a: Array) -> float:
        return float(a @ gram @ mean + radius * np.sqrt(max(a @ gram @ a, 0)))

    constraint = {"type": "eq", "fun": lambda a: a.sum() - 1}
    starts = [mean, *np.random.default_rng(1).dirichlet(np.ones(tasks), 4)]
    best = min(
        optimize.minimize(dual, start, bounds=[(0, 1)] * tasks, constraints=constraint, tol=1e-12).fun
        for start in starts
    )
    w = cagrad.weights(gram, c)
    if not w.any():
        assert best < 1e-5  # stationary
        return
    assert (gram @ w).min() > best - 1e-5
    assert np.sqrt(max((w - mean) @ gram @ (w - mean), 0)) == pytest.approx(radius, abs=1e-6)


@pytest.mark.parametrize("rows", [[[1, 0], [-1, 1e-8]], [[1, 0], [-0.5, 0], [0, 1]], [[1, 0], [-1, 0], [0, 1e-3]]])
def test_cagrad_stops_at_a_stationary_point(rows: list[list[float]]) -> None:
    """Where g or a J is zero, but for rounding. Weights as large as its inverse, about 1e14, would follow."""
    J = np.array(rows)
    gram = J @ J.T
    assert not cagrad.weights(gram / gram.diagonal().max()).any()


@pytest.mark.parametrize("ratio", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
def test_lengths_of_very_different_sizes(tasks: int, ratio: float) -> None:
    """Named after the bug: a gradient a million times shorter stopped CAGrad and misled MGDA; with eight tasks, a thousand.

    Each method's conditions of optimality, in units of each gradient's own length.
    """
    for seed in range(3):
        J = np.random.default_rng(seed).standard_normal((tasks, 40)) * np.geomspace(1, ratio, tasks)[:, None]
        lengths = np.linalg.norm(J, axis=1)
        J[1:] -= 0.4 * lengths[1:, None] * J[0] / lengths[0]  # conflicts with the longest
        gram = J @ J.T / np.square(J).sum(1).max()
        lengths = np.sqrt(gram.diagonal())

        a = mgda.weights(gram)
        assert (gram @ a).min() >= (a @ gram @ a) * (1 - 1e-6)

        w = upgrad.weights(gram)
        assert (gram @ w / lengths).min() > -1e-9 * (w @ lengths)

        w = cagrad.weights(gram, 0.5)
        mean = np.full(tasks, 1 / tasks)
        radius = 0.5 * np.sqrt(mean @ gram @ mean)
        a = (w - mean) / (w - mean).sum()
        dual = a @ gram @ mean + radius * np.sqrt(a @ gram @ a)  # no d of the ball serves the worst task better
        assert (gram @ w).min() == pytest.approx(dual, rel=1e-4)
        assert np.sqrt((w - mean) @ gram @ (w - mean)) == pytest.approx(radius)


def test_upgrad_sees_conflicts_of_short_gradients() -> None:
    """Named after the bug: two gradients ten million times shorter than a third one kept their conflict."""
    J = np.array([[1, 0, 0], [0, 1e-7, 0], [0, -1e-7, 1e-7]])
    np.testing.assert_allclose(upgrad.weights(J @ J.T), [1 / 3, 2 / 3, 1 / 2])


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_aligned_mtl_balances_components(tasks: int) -> None:
    """With rows B J the Gram matrix is the weakest eigenvalue times the identity."""
    gram = random_gram(tasks, 30, 0)
    values, vectors = np.linalg.eigh(gram)
    balance = vectors @ np.diag(np.sqrt(values.min() / values)) @ vectors.T
    np.testing.assert_allclose(balance @ gram @ balance, values.min() * np.eye(tasks), atol=1e-9)
    np.testing.assert_allclose(aligned_mtl.weights(gram), balance.mean(1), atol=1e-9)


@pytest.mark.parametrize(
    ("method", "theirs", "tolerance"),
    [
        ("upgrad", "UPGradWeighting", 5e-3),
        ("mgda", "MGDAWeighting", 5e-3),
        ("aligned_mtl", "AlignedMTLWeighting", 1e-4),
    ],
)
def test_methods_agree_with_torchjd(method: str, theirs: str, tolerance: float) -> None:
    """w J must agree. torchjd regularizes UPGrad and stops MGDA early, hence the tolerances."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    try:
        weighting = getattr(aggregation, theirs)()
    except ImportError as missing:
        pytest.skip(str(missing))
    for seed in range(3):
        J = oracles.random_rows(4, 40, seed=seed)
        ours = surgery.weights(method, "mean")(ops.gram(J)) @ J
        their_own = weighting(J @ J.T) @ J
        assert (ours - their_own).norm() < tolerance * J.norm(dim=1).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
def test_gradvac_is_torchjds(monkeypatch: pytest.MonkeyPatch, tasks: int, kind: str) -> None:
    """Over several steps, whose cosines move the targets; in the same task orders."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    ours = gradvac.GradVac("sum", torch.Generator().manual_seed(0), beta=0.5)
    theirs = aggregation.GradVacWeighting(beta=0.5, eps=1e-30)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        J = rows(tasks, kind).double()
        J = J + 0.3 * step * J.roll(step, 1)
        gram = J @ J.T
        w = ours(gram)
        visited = [
            [j for j in order if j != i] for i, order in enumerate(surgery.task_orders(tasks, generator).tolist())
        ]
        ranks = iter([torch.tensor([j - (j > i) for j in order], dtype=torch.int64) for i, order in enumerate(visited)])
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randperm", lambda n, ranks=ranks: next(ranks))
            expected = theirs(gram)
        if kind == "opposite" and tasks > 2:  # a gradient that is 0 after two projections: theirs follows its rounding
            assert (w.abs() * J.norm(dim=1)).max() < 10 * J.norm(dim=1).sum()
            continue
        scale = float((w.abs() @ J.abs()).max()) + 1e-300
        torch.testing.assert_close(w @ J, expected @ J, rtol=1e-6, atol=1e-6 * scale)


def test_gradvac_starts_as_pcgrad_and_continues_from_its_state() -> None:
    J = rows(5, "nearly opposite").double()
    ours = gradvac.GradVac("sum", torch.Generator().manual_seed(0))
    pcgrads = oracles.pcgrad(J, orders(5).tolist())
    torch.testing.assert_close(ours(J @ J.T) @ J, pcgrads, rtol=1e-2, atol=0.1)
    state = ours.state_dict()
    assert state["targets"].abs().max() > 0
    after = [ours(J @ J.T) for _ in range(3)]
    for _ in range(2):  # neither the saved nor a resumed method changes the state
        resumed = gradvac.GradVac("sum")
        resumed.load_state_dict(state)
        assert all(map(torch.equal, after, [resumed(J @ J.T) for _ in range(3)]))


def test_gradvacs_targets_move_by_a_hundredth_of_the_way() -> None:
    """The paper's beta, which `surgery.weights("gradvac")` uses."""
    ours = surgery.weights("gradvac")
    ours(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    assert ours.state_dict()["targets"].flatten().tolist() == pytest.approx([0.0, -0.005, -0.005, 0.0])


def test_gradvacs_targets_begin_again_with_another_number_of_tasks() -> None:
    """As when a course loop leaves out a loss."""
    ours = gradvac.GradVac(beta=1.0)
    for tasks in (3, 2, 4):
        J = rows(tasks, "nearly opposite").double()
        assert ours(J @ J.T).isfinite().all()
        assert ours.targets.shape == (tasks, tasks)
        assert (ours.targets + torch.eye(tasks)).all()


def test_gradvac_of_gradients_that_were_parallel_for_long() -> None:
    """Named after the bug: a cosine one rounding below a target of 1 took 96 % of both gradients away."""
    ours = gradvac.GradVac()
    ours.load_state_dict(ours.state_dict() | {"targets": torch.ones(2, 2, dtype=torch.float64)})
    gram = torch.tensor([[1.0, 1 - 1e-15], [1 - 1e-15, 1.0]], dtype=torch.float64)
    assert ours(gram).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("result", [2.0, [0.5, 0.5], torch.ones(3, 1), torch.ones(4)])
@pytest.mark.parametrize("kind", ["host", "callable"])
def test_weights_of_another_shape_are_refused(kind: str, result: object) -> None:
    """A number became every task's weight without a word, and other shapes ended inside torch."""

    def mine(gram: object) -> Any:
        return result

    method = surgery.weights(mine) if kind == "callable" else OnHost(mine)
    with pytest.raises(ValueError, match=r"surgery method mine gave weights of shape \[.*\], expected \[3\]"):
        method(torch.eye(3))


def test_a_step_that_is_skipped_leaves_gradvacs_targets() -> None:
    J = rows(3, "nearly opposite").double()
    ours = gradvac.GradVac()
    ours(J @ J.T)
    before = ours.state_dict()["targets"]
    J[1, 0] = torch.nan
    ours(J @ J.T)
    assert torch.equal(ours.state_dict()["targets"], before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge and tiny"])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
def test_imtl_g_is_torchjds(tasks: int, kind: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = rows(tasks, kind).double()
    expected = aggregation.IMTLGWeighting()(J @ J.T) @ J
    expected = expected * float(J.any(1).double().mean())  # a task without a gradient counts in our mean
    scale = float(J.norm(dim=1).max())
    torch.testing.assert_close(surgery.weights("imtl_g", "mean")(J @ J.T) @ J, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("largest", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_imtl_g_projects_equally_on_every_gradient(tasks: int, largest: float) -> None:
    J = largest * rows(tasks, "random").double() * torch.linspace(0.1, 1, tasks)[:, None]
    combined = surgery.weights("imtl_g", "mean")(J @ J.T) @ J
    projections = (J @ combined) / J.norm(dim=1)
    torch.testing.assert_close(projections, projections[:1].expand(tasks), rtol=1e-4, atol=0)


def test_imtl_g_of_a_gradient_and_its_negative_is_zero() -> None:
    """But for rounding: weights of twenty million would follow."""
    assert not imtl_g.weights(np.array([[1, -1], [-1, 1 + 1e-7]])).any()


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("ratio", [1e-2, 1e-4, 1e-5])
def test_a_short_gradient_is_no_rounding_error(tasks: int, ratio: float) -> None:
    """Named after the bug: a gradient 2,000 times shorter than another one lost its weight, and got none of the step."""
    J = rows(tasks, "random").double()
    J[0] *= ratio
    gram = ops.gram(J.float())
    u = J / J.norm(dim=1, keepdim=True)
    projections = u @ (surgery.weights("imtl_g", "mean")(gram).double() @ J)
    torch.testing.assert_close(projections, projections[:1].expand(tasks), rtol=1e-3, atol=0)
    balanced = surgery.weights("aligned_mtl", "mean")(gram).double()
    assert 0.9 / tasks < balanced[0] < 1.1 / tasks  # the others are shortened to this one
    assert balanced[1:].abs().max() < 2 * ratio


@pytest.mark.parametrize("largest", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_nash_mtl_is_the_bargaining_solution(tasks: int, kind: str, largest: float) -> None:
    """G a = 1 / a, at any scale of G; opposite gradients, which have no such a, cancel out."""
    J = largest * rows(tasks, kind).double()
    gram = J @ J.T
    a = surgery.weights("nash_mtl", "sum")(gram)
    used = gram.diagonal() > 0
    assert (a[used] > 0).all()
    assert (a[~used] == 0).all()
    if kind == "opposite" and tasks > 1:
        assert (a @ J).norm() < 1e-3 * (a @ J.abs()).norm()
    elif used.any():
        scaled = gram / gram.diagonal().max()
        torch.testing.assert_close((a * (scaled @ a))[used], torch.ones_like(a[used]), rtol=1e-4, atol=1e-4)


def test_torchjd_weightings_fit_the_slot() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = rows(3, "random")
    weighting = aggregation.MGDAWeighting()
    torch.testing.assert_close(surgery.weights(weighting)(ops.gram(J)), weighting(J @ J.T))
    J[0] = torch.nan
    w = surgery.weights(weighting)(ops.gram(J))
    assert w[0] == 0
    torch.testing.assert_close(w[1:], weighting(J[1:] @ J[1:].T))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MGDA", {}),
        ("IMTLGWeighting", {}),
        ("Krum(n_byzantine=1, n_selected=2)", {"n_byzantine": 1, "n_selected": 2}),
        ("AlignedMTL(pref_vector=[0.1, 0.2, 0.3, 0.4])", {"pref_vector": torch.tensor([0.1, 0.2, 0.3, 0.4])}),
    ],
)
def test_torchjd_weightings_by_name(name: str, options: dict[str, Any]) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    gram = ops.gram(rows(4, "random"))
    kind = getattr(aggregation, name.split("(")[0].removesuffix("Weighting") + "Weighting")
    torch.testing.assert_close(surgery.weights(f"torchjd:{name}")(gram), kind(**options)(gram))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoSuch", "expected one of AlignedMTL, CAGrad, "),
        ("", "expected one of AlignedMTL, CAGrad, "),
        ("ExcessMTL", "ExcessMTL needs the gradients themselves, not their Gram matrix"),
        ("CRMOGM(weighting='MGDA')", "CRMOGM needs another weighting"),
        ("Krum", "missing 1 required positional argument: 'n_byzantine'"),
        ("Krum(1)", r"expected NAME or NAME\(option=value, ...\)"),
        ("Krum(n_byzantine=", r"expected NAME or NAME\(option=value, ...\)"),
        ("Krum(n_byzantine=print())", r"expected NAME or NAME\(option=value, ...\)"),
        ("Krum(n_byzantine=-1)", "n_byzantine"),
        ("MGDA(speed=3)", "unexpected keyword argument 'speed'"),
    ],
)
def test_torchjd_names_that_do_not_fit(name: str, message: str) -> None:
    pytest.importorskip("torchjd.aggregation")
    with pytest.raises(ValueError, match=message) as raised:
        surgery.weights(f"torchjd:{name}")
    assert str(raised.value).startswith(f"surgery method 'torchjd:{name}': ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["GradVac", "PCD", "PCGrad", "Random"])
def test_a_restored_torchjd_weighting_goes_on(name: str) -> None:
    """Running averages and random numbers, also across a step whose gradients are not all finite."""
    pytest.importorskip("torchjd.aggregation")

    def made() -> surgery.Weights:
        return surgery.weights(f"torchjd:{name}", generator=torch.Generator().manual_seed(3))

    grams = [ops.gram(oracles.random_rows(3, 20, seed=seed)) for seed in range(6)]
    grams[3][1, 1] = torch.nan
    whole, cut = made(), made()
    expected = [whole(gram) for gram in grams]
    for gram in grams[:2]:
        cut(gram)
    resumed, blank = made(), made()
    state = cut.state_dict()
    cut(grams[5])  # does not change the state
    resumed.load_state_dict(state)
    torch.manual_seed(99)  # of no influence
    for gram, w in zip(grams[2:], expected[2:], strict=True):
        assert torch.equal(resumed(gram), w)
    assert not all(torch.equal(blank(gram), w) for gram, w in zip(grams[2:], expected[2:], strict=True))


def test_a_broken_gradient_leaves_the_state_of_a_weighting_alone() -> None:
    pytest.importorskip("torchjd.aggregation")
    one, other = (surgery.weights("torchjd:PCD") for _ in range(2))
    gram = ops.gram(oracles.random_rows(3, 20))
    broken = gram.clone()
    broken[0, 0] = torch.inf
    for method in (one, other):
        method(gram)
    assert one(broken)[0] == 0
    kept, expected = (
        {k: v for k, v in method.state_dict().items() if k.startswith("weighting/")} for method in (one, other)
    )
    assert kept
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    assert torch.equal(one(2 * gram), other(2 * gram))


class Averaged:
    """Weights for three tasks, with a state."""

    def __init__(self) -> None:
        self.squares = torch.ones(3)

    def __call__(self, gram: Tensor) -> Tensor:
        self.squares = (self.squares + gram.diagonal()) / 2
        return 1 / self.squares


@pytest.mark.parametrize(
    "method",
    [
        "torchjd:Constant(weights=[1.0, 2.0, 3.0])",
        "torchjd:UPGrad(pref_vector=[1.0, 2.0, 3.0])",
        "torchjd:Krum(n_byzantine=0)",
        Averaged(),
    ],
)
def test_a_broken_gradient_under_weights_for_three_tasks(method: Any) -> None:
    """Named after the bug: weights for a certain number of tasks ended the run where the step should be skipped."""
    if isinstance(method, str):
        pytest.importorskip("torchjd.aggregation")
    gram = ops.gram(oracles.random_rows(3, 20))
    gram[1] = gram[:, 1] = torch.nan
    w = surgery.weights(method)(gram)
    assert w[1] == 0
    assert w.isfinite().all()
    if isinstance(method, Averaged):
        assert torch.equal(method.squares, torch.ones(3))


def test_torchjd_draws_what_the_generator_says() -> None:
    """Processes of one run have different seeds of torch's own generator, and must take the same step."""
    pytest.importorskip("torchjd.aggregation")
    gram = ops.gram(rows(4, "nearly opposite"))
    drawn = []
    for seed in range(3):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn.append(surgery.weights("torchjd:PCGrad", generator=torch.Generator().manual_seed(1))(gram))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("method", ["torchjd:MGDA", lambda gram: gram[0]])
def test_weights_that_are_given_take_no_mean(method: Any) -> None:
    with pytest.raises(ValueError, match='reduction = "mean" has no effect on it'):
        surgery.weights(method, "mean")


def test_torchjd_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ValueError, match="'torchjd:MGDA': TorchJD is not installed; run pip install torchjd"):
        surgery.weights("torchjd:MGDA")


def test_random_orders_come_from_the_generator_alone() -> None:
    gram = ops.gram(rows(5, "nearly opposite"))

    def draws(seed: int) -> list[Tensor]:
        weights = surgery.weights("pcgrad", generator=torch.Generator().manual_seed(seed))
        return [weights(gram) for _ in range(4)]

    first = draws(0)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, draws(0)))
    assert not all(map(torch.equal, first, draws(1)))
    assert len({tuple(w.tolist()) for w in first}) > 1


@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "torchjd:GradVac"])
def test_a_state_may_come_from_any_device(hardware: torch.device, method: str) -> None:
    """As `torch.load(..., map_location=device)` gives it; a CPU generator refuses a state on a GPU."""
    if method.startswith("torchjd:"):
        pytest.importorskip("torchjd.aggregation")
    gram = ops.gram(rows(4, "nearly opposite"))
    weights, resumed = (surgery.weights(method, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    weights(gram)
    resumed.load_state_dict({name: value.to(hardware) for name, value in weights.state_dict().items()})
    assert torch.equal(weights(gram), resumed(gram))


def test_a_call_draws_what_draw_draws() -> None:
    gram = ops.gram(rows(4, "nearly opposite"))
    one, other = (pcgrad.Projections(generator=torch.Generator().manual_seed(0)) for _ in range(2))
    for _ in range(3):
        assert torch.equal(one(gram, one.draw(4)), other(gram))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tasks", "max_norm"), [(4, 0.0), (4, 1e-3), (64, 1.0), (4, 1e9)])
def test_clip_scale_is_the_norm_of_the_combination(
    hardware: torch.device, tasks: int, max_norm: float, implementation: str
) -> None:
    J, w = rows(tasks, "random").to(hardware), torch.tensor([1.0, -0.5, 0.0, 2.0], device=hardware).repeat(tasks // 4)
    J[2] = torch.nan  # weight 0: takes no part
    scalars = torch.tensor([0.1, 3.0, 7.0, 7.0], device=hardware)
    extra = torch.tensor([5.0], device=hardware)
    with cuda_on_cpu.running(implementation, hardware):
        norm = ops.clip_scale(ops.gram(J), w, max_norm, scalars, extra)
    expected = (ops.combine(J, w).square().sum() + extra).sqrt()
    torch.testing.assert_close(norm, expected)
    scale = min(1.0, max_norm / (expected.item() + 1e-6)) if max_norm else 1.0
    torch.testing.assert_close(scalars.cpu(), torch.tensor([0.1, 3.0, scale, 0.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_norm_that_is_not_finite_skips_the_step(hardware: torch.device, implementation: str) -> None:
    J = rows(2, "random").to(hardware)
    J[1] = torch.inf
    scalars = torch.tensor([0.1, 3.0, 7.0, 0.0], device=hardware)
    with cuda_on_cpu.running(implementation, hardware):
        norm = ops.clip_scale(ops.gram(J), torch.ones(2, device=hardware), 1.0, scalars)
    assert not norm.isfinite().any()
    assert scalars[2:].tolist() == [1.0, 1.0]


def test_refusals() -> None:
    gram, order = torch.eye(3), orders(3)
    for g, o, message in [
        (torch.ones(3, 4), order, r"gram must have shape \[3, 3\]"),
        (torch.eye(65), orders(65), "1 to 64 tasks"),
        (gram.double(), order, "gram must be float32"),
        (gram.T[:, :2], order, "contiguous"),
        (gram, order.long(), "order must be int32"),
        (gram, order[:2], r"order must have shape \[3, 3\]"),
        (gram, order.T, "order must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.pcgrad_weights(g, o)
    with pytest.raises(ValueError, match=r"order holds 3, which is not in \[0, 3\)"):
        ops.pcgrad_weights(gram, order + 1)
    with pytest.raises(ValueError, match=r"scalars must have shape \[4\]"):
        ops.clip_scale(gram, torch.ones(3), 1.0, torch.zeros(3))
    with pytest.raises(ValueError, match="must not share memory"):
        ops.clip_scale(gram, torch.ones(3), 1.0, gram.view(-1)[:4])
    with pytest.raises(ValueError, match="expected one of none, pcgrad"):
        surgery.weights("pcgard")
    with pytest.raises(ValueError, match='expected "sum" or "mean"'):
        surgery.weights("pcgrad", "total")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a name or a callable"):
        surgery.weights(3)  # type: ignore[arg-type]


def test_cuda_skips_a_task_that_is_not_there() -> None:
    """A kernel cannot report an order out of range, and must not read beyond G."""
    gram = ops.gram(rows(3, "nearly opposite"))
    results = []
    with cuda_on_cpu.running(cuda_on_cpu.NAME, gram.device):
        for order in ([[3, 2, -1], [1, 0, 2], [0, 1, 2]], [[0, 2, 0], [1, 0, 2], [0, 1, 2]]):
            results.append(ops.pcgrad_weights(gram, torch.tensor(order, dtype=torch.int32))[0])
    assert torch.equal(*results)


def test_a_registered_method_may_make_a_plain_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(gram: Tensor) -> Tensor:
        return torch.eye(len(gram))[0]

    monkeypatch.setitem(surgery.METHODS, "first", lambda reduction, generator: first)
    method = surgery.weights("first")
    assert isinstance(method, surgery.Weights)
    assert method(torch.eye(3)).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="gives the weights themselves"):
        surgery.weights("first", "mean")
