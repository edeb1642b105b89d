# SPDX-License-Identifier: Apache-2.0
"""From G to w: PCGrad against whole-vector loops in fp64, the other methods against their definitions and TorchJD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minbert_fast import ops, surgery
from minbert_fast.ops.backend import Implementation, force
from minbert_fast.surgery import solvers
from tests.surgery import oracles

IMPLEMENTATIONS: list[Implementation] = ["native", "torch"]


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
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 6, 7, 8])
def test_pcgrad_is_the_naive_loop(device: torch.device, tasks: int, kind: str, implementation: Implementation) -> None:
    J = rows(tasks, kind)
    for seed in range(4):
        order, mean = orders(tasks, seed), seed % 2 == 1
        with force(implementation):
            gram = (J.double() @ J.double().T).float().to(device)
            w, nonfinite = ops.pcgrad_weights(gram, order.to(device), mean)
        assert not nonfinite.any()
        close_combination(w.cpu(), J, oracles.pcgrad(J, order.tolist(), mean))


def test_the_order_decides() -> None:
    """With three tasks in conflict, two orders give two answers, each the naive loop's."""
    J = rows(3, "nearly opposite")
    gram = ops.gram(J)
    answers = []
    for order in ([[0, 1, 2], [1, 0, 2], [2, 0, 1]], [[0, 2, 1], [1, 2, 0], [2, 1, 0]]):
        w, _ = ops.pcgrad_weights(gram, torch.tensor(order, dtype=torch.int32))
        close_combination(w, J, oracles.pcgrad(J, order))
        answers.append(w)
    assert not torch.allclose(answers[0], answers[1])


@given(st.integers(2, 8), st.integers(0, 1000), st.floats(-1, 1))
@settings(max_examples=50, deadline=None)
def test_pcgrad_of_any_gradients(tasks: int, seed: int, lean: float) -> None:
    J = oracles.random_rows(tasks, 20, seed=seed) + lean * torch.linspace(-1, 1, tasks)[:, None]
    order = orders(tasks, seed)
    results = []
    for implementation in IMPLEMENTATIONS:
        with force(implementation):
            w, _ = ops.pcgrad_weights(ops.gram(J), order)
        results.append(w)
        close_combination(w, J, oracles.pcgrad(J, order.tolist()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_pcgrad_is_torchjds(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = rows(6, "nearly opposite")
    gram, order = ops.gram(J), orders(6)
    permutations = iter(order)
    monkeypatch.setattr(torch, "randperm", lambda n: next(permutations).long())
    theirs = aggregation.PCGradWeighting()(gram)
    w, _ = ops.pcgrad_weights(gram, order)
    torch.testing.assert_close(w, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_broken_tasks_are_reported_and_left_out(
    device: torch.device, bad: float, implementation: Implementation
) -> None:
    """1e30 is finite, but its square is not."""
    J = rows(5, "nearly opposite")
    J[3, 7] = bad
    order = orders(5)
    with force(implementation):
        w, nonfinite = ops.pcgrad_weights(ops.gram(J.to(device)), order.to(device))
    assert nonfinite.tolist() == [0, 0, 0, 1, 0]
    assert w[3] == 0
    others = [0, 1, 2, 4]
    remaining = [[others.index(j) for j in order[i].tolist() if j != 3] for i in others]
    close_combination(w[others].cpu(), J[others], oracles.pcgrad(J[others], remaining))


@pytest.mark.parametrize("method", surgery.METHODS)
def test_every_method_leaves_broken_tasks_out(method: str) -> None:
    J = rows(4, "random")
    J[1] = torch.nan
    others = [0, 2, 3]
    w = surgery.weights(method, "sum", torch.Generator().manual_seed(0))(ops.gram(J))
    assert w[1] == 0
    if method != "pcgrad":  # whose random orders differ with the number of tasks
        healthy = surgery.weights(method, "sum")(ops.gram(J[others]))
        scale = 1.0 if method == "none" else 4 / 3  # "sum" is T times the published mean
        torch.testing.assert_close(w[others], scale * healthy, rtol=1e-4, atol=1e-5)
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


def random_gram(tasks: int, rank: int, seed: int) -> solvers.Array:
    J = np.random.default_rng(seed).standard_normal((tasks, rank))
    gram: solvers.Array = J @ J.T
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
    assert (gram @ solvers.upgrad(gram)).min() > -1e-9


@pytest.mark.parametrize(("tasks", "rank", "seed"), CASES)
def test_mgda_is_the_shortest_combination(tasks: int, rank: int, seed: int) -> None:
    gram = random_gram(tasks, rank, seed)
    a = solvers.mgda(gram)
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

    def dual(a: solvers.Array) -> float:
        return float(a @ gram @ mean + radius * np.sqrt(max(a @ gram @ a, 0)))

    constraint = {"type": "eq", "fun": lambda a: a.sum() - 1}
    starts = [mean, *np.random.default_rng(1).dirichlet(np.ones(tasks), 4)]
    best = min(
        optimize.minimize(dual, start, bounds=[(0, 1)] * tasks, constraints=constraint, tol=1e-12).fun
        for start in starts
    )
    w = solvers.cagrad(gram, c)
    if not w.any():
        assert best < 1e-5  # stationary
        return
    assert (gram @ w).min() > best - 1e-5
    assert np.sqrt(max((w - mean) @ gram @ (w - mean), 0)) == pytest.approx(radius, abs=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_aligned_mtl_balances_components(tasks: int) -> None:
    """With rows B J the Gram matrix is the weakest eigenvalue times the identity."""
    gram = random_gram(tasks, 30, 0)
    values, vectors = np.linalg.eigh(gram)
    balance = vectors @ np.diag(np.sqrt(values.min() / values)) @ vectors.T
    np.testing.assert_allclose(balance @ gram @ balance, values.min() * np.eye(tasks), atol=1e-9)
    np.testing.assert_allclose(solvers.aligned_mtl(gram), balance.mean(1), atol=1e-9)


@pytest.mark.parametrize(
    ("method", "theirs", "tolerance"),
    [
        ("upgrad", "UPGradWeighting", 5e-3),
        ("mgda", "MGDAWeighting", 5e-3),
        ("aligned_mtl", "AlignedMTLWeighting", 1e-4),
    ],
)
def test_methods_agree_with_torchjd(method: str, theirs: str, tolerance: float) -> None:
    """Theirs regularize (UPGrad) or stop early (MGDA), hence the tolerances; w J is what must agree."""
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


def test_torchjd_weightings_fit_the_slot() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    J = rows(3, "random")
    weighting = aggregation.MGDAWeighting()
    torch.testing.assert_close(surgery.weights(weighting)(ops.gram(J)), weighting(J @ J.T))
    J[0] = torch.nan
    w = surgery.weights(weighting)(ops.gram(J))
    assert w[0] == 0
    torch.testing.assert_close(w[1:], weighting(J[1:] @ J[1:].T))


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


def test_state_continues_the_orders() -> None:
    gram = ops.gram(rows(5, "nearly opposite"))
    weights = surgery.weights("pcgrad", generator=torch.Generator().manual_seed(0))
    weights(gram)
    state = weights.state_dict()
    after = [weights(gram) for _ in range(3)]
    resumed = surgery.weights("pcgrad")
    resumed.load_state_dict(state)
    assert all(map(torch.equal, after, [resumed(gram) for _ in range(3)]))


def test_prepare_draws_once_a_step() -> None:
    """prepare then call is one step's draw, into a tensor that stays where it is (a captured graph reads it)."""
    gram = ops.gram(rows(4, "nearly opposite"))
    one, other = (surgery.Projections(generator=torch.Generator().manual_seed(0)) for _ in range(2))
    for _ in range(3):
        one.prepare(4, gram.device)
        place = one._orders.data_ptr() if one._orders is not None else 0
        assert torch.equal(one(gram), other(gram))
    one.prepare(4, gram.device)
    assert one._orders is not None
    assert one._orders.data_ptr() == place


def test_statistics() -> None:
    J = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    gram = ops.gram(J)
    expected = torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, 0], [-1, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(surgery.cosines(gram), expected)
    assert surgery.conflicts(gram).item() == pytest.approx(1 / 6)
    assert surgery.conflicts(gram[:1, :1]).item() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1.0, 1e9])
def test_clip_scale_is_the_norm_of_the_combination(
    device: torch.device, max_norm: float, implementation: Implementation
) -> None:
    J, w = rows(4, "random").to(device), torch.tensor([1.0, -0.5, 0.0, 2.0], device=device)
    J[2] = torch.nan  # weight 0: takes no part
    scalars = torch.tensor([0.1, 3.0, 7.0, 7.0], device=device)
    extra = torch.tensor([5.0], device=device)
    with force(implementation):
        norm = ops.clip_scale(ops.gram(J), w, max_norm, scalars, extra)
    expected = (ops.combine(J, w).square().sum() + extra).sqrt()
    torch.testing.assert_close(norm, expected)
    scale = min(1.0, max_norm / (expected.item() + 1e-6)) if max_norm else 1.0
    torch.testing.assert_close(scalars.cpu(), torch.tensor([0.1, 3.0, scale, 0.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_norm_that_is_not_finite_skips_the_step(device: torch.device, implementation: Implementation) -> None:
    J = rows(2, "random").to(device)
    J[1] = torch.inf
    scalars = torch.tensor([0.1, 3.0, 7.0, 0.0], device=device)
    with force(implementation):
        norm = ops.clip_scale(ops.gram(J), torch.ones(2, device=device), 1.0, scalars)
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
