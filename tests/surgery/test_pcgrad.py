# SPDX-License-Identifier: Apache-2.0
"""PCGrad(optimizer), as course code uses it, against the classic loop and the trainer's choices in fp64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minbert_fast import surgery
from minbert_fast.surgery import buckets
from minbert_fast.surgery.wrapper import PCGrad
from tests.surgery import oracles


class Model(nn.Module):
    """A shared encoder, one head a task, a parameter that two of three tasks use and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.pair = nn.Parameter(torch.ones(5))
        self.unused = nn.Parameter(torch.ones(2))

    def losses(self, xs: list[Tensor]) -> list[Tensor]:
        """Three losses that pull against each other; one graph for all when the inputs are one tensor."""
        encoded = {id(x): self.encoder(x) for x in xs}
        results = []
        for task, (x, head) in enumerate(zip(xs, self.heads, strict=True)):
            hidden = encoded[id(x)] * self.pair if task < 2 else encoded[id(x)]
            results.append((head(hidden) - (-3.0) ** task).square().mean())
        return results


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def inputs(one_graph: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    xs = [torch.randn(4, 6) for _ in range(3)]
    return [xs[0]] * 3 if one_graph else xs


def naive(model: Model, xs: list[Tensor], orders: Tensor, mean: bool) -> dict[str, Tensor | None]:
    """Gradients by the definition: T fp64 backwards, the whole-vector loop over what at least two tasks reach."""
    twin = copy.deepcopy(model).double()
    names = [n for n, _ in twin.named_parameters()]
    rows = [
        torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True, allow_unused=True)
        for loss in twin.losses([x.double() for x in xs] if xs[0] is not xs[1] else [xs[0].double()] * 3)
    ]
    reached = [sum(row[i] is not None for row in rows) for i in range(len(names))]
    shared = [i for i in range(len(names)) if reached[i] > 1]
    parameters = list(twin.parameters())

    def flat(row: tuple[Tensor | None, ...]) -> Tensor:
        pieces = ((i, row[i]) for i in shared)
        return torch.cat([(torch.zeros_like(parameters[i]) if g is None else g).flatten() for i, g in pieces])

    merged = oracles.pcgrad(torch.stack([flat(row) for row in rows]), orders.tolist(), mean)
    result: dict[str, Tensor | None] = {
        name: next((row[i] for row in rows if row[i] is not None), None) for i, name in enumerate(names)
    }
    sizes = [parameters[i].numel() for i in shared]
    for i, piece in zip(shared, merged.split(sizes), strict=True):
        result[names[i]] = piece.view_as(parameters[i])
    return result


def assert_gradients(model: nn.Module, expected: dict[str, Tensor | None]) -> None:
    for name, p in model.named_parameters():
        want = expected[name]
        if want is None:
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad.double(), want, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def orders_of(seed: int) -> Tensor:
    return surgery.task_orders(3, torch.Generator().manual_seed(seed))


# The trainer's choices; with gradients that add up, a parameter that no loss reaches keeps None.
TRAINERS: dict[str, Any] = {"scope": "shared", "accumulate": True, "weights": "pcgrad"}


@pytest.mark.parametrize("bucket", [1, 40, 1 << 24])
@pytest.mark.parametrize("one_graph", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_trainers_choices_are_the_naive_loop(
    model: Model, monkeypatch: pytest.MonkeyPatch, one_graph: bool, reduction: surgery.Reduction, seed: int, bucket: int
) -> None:
    """Separate and shared graphs, heads of one task, a parameter of two tasks, one of none; any bucket size."""
    monkeypatch.setattr(buckets, "BUCKET", bucket)
    generator = torch.Generator().manual_seed(seed)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), reduction, generator=generator, **TRAINERS)
    optimizer.zero_grad()
    optimizer.pc_backward(model.losses(inputs(one_graph)))
    expected = naive(model, inputs(one_graph), orders_of(seed), reduction == "mean")
    assert_gradients(model, expected)
    assert optimizer.gram is not None
    assert (optimizer.gram < 0).any(), "nothing to operate on: the test would prove little"


class Trunk(nn.Module):
    """A shared trunk, two or three heads for T tasks (round robin), one frozen parameter and one unused parameter."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(heads))
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def losses(self, x: Tensor, tasks: int, one_graph: bool = True) -> list[Tensor]:
        shared = self.trunk(x)
        hidden = [shared if one_graph else self.trunk(x) for _ in range(tasks)]
        outputs = [self.heads[t % len(self.heads)](torch.tanh(h * self.frozen)) for t, h in enumerate(hidden)]
        targets = (1.0, -2.0, -3.0, 4.0, 5.0)
        return [(output - target).square().mean() for output, target in zip(outputs, targets, strict=False)]


def classic(model: nn.Module, losses: list[Tensor], orders: Tensor, mean: bool = True) -> dict[str, Tensor | None]:
    """The classic's gradients of `model`, whose losses are fp64."""
    merged = oracles.classic_pc_backward(losses, list(model.parameters()), orders.tolist(), mean)
    return dict(zip((name for name, _ in model.named_parameters()), merged, strict=True))


@pytest.mark.parametrize("bucket", [1, 1 << 24])
@pytest.mark.parametrize("one_graph", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("heads", "tasks"), [(2, 2), (2, 3), (3, 3), (2, 4), (3, 4), (2, 5), (3, 5)])
def test_gradients_are_the_classics(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    tasks: int,
    reduction: surgery.Reduction,
    one_graph: bool,
    bucket: int,
) -> None:
    """Averaged where all tasks reach, added elsewhere, zeros where none does; heads count; every task order."""
    monkeypatch.setattr(buckets, "BUCKET", bucket)
    torch.manual_seed(tasks)
    model, x = Trunk(heads), torch.randn(5, 4)
    twin = copy.deepcopy(model).double()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), reduction, generator=generator)
        optimizer.pc_backward(model.losses(x, tasks, one_graph))
        orders = surgery.task_orders(tasks, torch.Generator().manual_seed(seed))
        assert_gradients(model, classic(twin, twin.losses(x.double(), tasks), orders, reduction == "mean"))
        assert optimizer.gram is not None
        assert (optimizer.gram < 0).any(), "nothing to operate on: the test would prove little"


def test_the_classics_loop_has_no_zero_grad() -> None:
    """Named after the bug: gradients added up over the steps of the classic's documented loop."""
    torch.manual_seed(0)
    model, x = Trunk(3), torch.randn(5, 4)
    twin = copy.deepcopy(model).double()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        optimizer.pc_backward(model.losses(x, 3))
        expected = classic(twin, twin.losses(x.double(), 3), surgery.task_orders(3, generator))
        assert_gradients(model, expected)
        optimizer.step()
        with torch.no_grad():
            for p, gradient in zip(twin.parameters(), expected.values(), strict=True):
                assert gradient is not None
                p.sub_(gradient, alpha=0.1)


def test_a_conflict_that_exists_only_because_heads_count() -> None:
    """The long gradient of task 1's head shortens what task 0 takes from it, and leaves a conflict with task 2."""
    directions = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [-0.2, 0.8]])
    trunk = nn.Parameter(torch.zeros(2))
    parameters: list[Tensor] = [trunk, *(nn.Parameter(torch.zeros(1)) for _ in range(3))]
    scales = (0.0, 18.0**0.5, 0.0)

    def losses(parameters: list[Tensor]) -> list[Tensor]:
        trunk, *heads = parameters
        return [
            (direction.to(trunk) * trunk).sum() + scale * head.sum()
            for direction, head, scale in zip(directions, heads, scales, strict=True)
        ]

    seed = next(s for s in range(99) if [t for t in orders_of(s)[0].tolist() if t] == [1, 2])
    twin = [p.detach().double().requires_grad_() for p in parameters]
    expected = oracles.classic_pc_backward(losses(twin), twin, orders_of(seed).tolist())
    apart = oracles.pcgrad(directions, orders_of(seed).tolist(), mean=True, own=True)
    assert not torch.allclose(expected[0], apart, rtol=0.1)
    for scope, trunks in (("all", expected[0]), ("shared", apart)):
        generator = torch.Generator().manual_seed(seed)
        sgd = torch.optim.SGD(parameters, lr=0.1)
        PCGrad(sgd, scope=scope, generator=generator).pc_backward(losses(parameters))  # type: ignore[arg-type]
        assert trunk.grad is not None
        torch.testing.assert_close(trunk.grad.double(), trunks, rtol=1e-5, atol=1e-6)


def test_the_classic_compares_a_gradient_with_its_own_original() -> None:
    angles = torch.tensor([0.0, 170.0, 250.0]).deg2rad()
    J = torch.stack([angles.cos(), angles.sin()], 1)
    differ = []
    for seed in range(8):
        p = nn.Parameter(torch.zeros(2))
        optimizer = PCGrad(torch.optim.SGD([p], lr=0.1), generator=torch.Generator().manual_seed(seed))
        optimizer.pc_backward([(row * p).sum() for row in J])
        expected = oracles.pcgrad(J, orders_of(seed).tolist(), mean=True, own=True)
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), expected, rtol=1e-5, atol=1e-6)
        differ.append(not torch.allclose(expected, oracles.pcgrad(J, orders_of(seed).tolist(), mean=True), rtol=1e-2))
    assert any(differ), "the paper's loop gives the same: the test would prove little"


def test_course_loop_learns(model: Model) -> None:
    """The classic usage, epoch after epoch, with the course's AdamW."""
    from minbert_fast import AdamW

    optimizer = PCGrad(AdamW(model.parameters(), lr=3e-2))
    first = sum(loss.item() for loss in model.losses(inputs()))
    for _ in range(60):
        optimizer.zero_grad()
        optimizer.pc_backward(model.losses(inputs()))
        optimizer.step()
    assert sum(loss.item() for loss in model.losses(inputs())) < 0.2 * first


@pytest.mark.parametrize("one_graph", [False, True])
def test_graphs_are_freed_as_soon_as_nobody_needs_them(model: Model, one_graph: bool) -> None:
    """No retain_graph beyond what several losses share: afterwards no loss has a graph left to run through."""
    losses = model.losses(inputs(one_graph))
    PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)).pc_backward(losses)
    for loss in losses:
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()


def test_gradients_accumulate_like_backward(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), accumulate=True, generator=generator)
    optimizer.pc_backward(model.losses(inputs()))
    once = {n: None if p.grad is None else p.grad.double() for n, p in model.named_parameters()}
    optimizer.weights.load_state_dict({"generator": torch.Generator().manual_seed(0).get_state()})
    optimizer.pc_backward(model.losses(inputs()))
    assert_gradients(model, {n: None if g is None else 2 * g for n, g in once.items()})


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_micro_batches_are_one_batch(model: Model, scope: Any) -> None:
    """Surgery of each task's summed gradients, not the sum of two surgeries; in the second step too."""
    halves = [inputs()[0], inputs()[0].flip(0) * 0.5]
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    made = [
        PCGrad(torch.optim.SGD(m.parameters(), lr=0.1), scope=scope, generator=torch.Generator().manual_seed(0))
        for m in (whole, parts)
    ]
    for _ in range(2):
        first, second = (whole.losses([x] * 3) for x in halves)
        made[0].pc_backward([a + b for a, b in zip(first, second, strict=True)])
        made[1].pc_backward(parts.losses([halves[0]] * 3), final=False)
        made[1].pc_backward(parts.losses([halves[1]] * 3))
        for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        for optimizer in made:
            optimizer.step()


def test_micro_batches_with_other_losses_are_refused(model: Model) -> None:
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), weights=lambda gram: torch.ones_like(gram[0]))
    optimizer.pc_backward(model.losses(inputs()), final=False)
    with pytest.raises(ValueError, match="reach other parameters"):
        optimizer.pc_backward(model.losses(inputs())[:2])
    optimizer.pc_backward(model.losses(inputs()))  # nothing is left over of the failure
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    sum(model.losses(inputs())).backward()  # type: ignore[union-attr]
    for p, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(p) if p.grad is None else p.grad)


def test_micro_batches_with_more_losses_are_refused() -> None:
    """Named after the bug: a further loss that reaches no parameter of the optimizer was an IndexError."""
    p, other = nn.Parameter(torch.ones(2)), torch.ones((), requires_grad=True)
    optimizer = PCGrad(torch.optim.SGD([p], lr=0.1))
    optimizer.pc_backward([p.sum(), p[0] * 2], final=False)
    with pytest.raises(ValueError, match="reach other parameters"):
        optimizer.pc_backward([p.sum(), p[0] * 2, other * 1])


def test_zero_grad_clears_micro_batches() -> None:
    """Named after the bug: the gradients of a batch that was given up came into the next step."""
    p = nn.Parameter(torch.ones(2))
    optimizer = PCGrad(torch.optim.SGD([p], lr=0.1))
    optimizer.pc_backward([p.sum() * 100, p[0] * 100], final=False)
    optimizer.zero_grad()
    optimizer.pc_backward([p.sum(), p[0] * 2])
    assert p.grad is not None
    assert p.grad.tolist() == [1.5, 0.5]


class _Without(torch.autograd.Function):
    """The sum of x; `p` is an input whose gradient is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.expand(ctx.shape), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_that_one_graph_withholds_is_no_part_of_the_buffer(dtype: torch.dtype) -> None:
    """Named after the bug: `.grad` lay in J, so the next call replaced it instead of adding to it."""
    trunk, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = PCGrad(torch.optim.SGD([trunk, head], lr=0.1), scope="shared", accumulate=True)
    for scale in (1.0, 2.0):
        optimizer.pc_backward([trunk.sum() + (scale * head).sum(), _Without.apply(trunk, head)])
    assert head.grad is not None
    assert head.grad.dtype == dtype
    assert head.grad.tolist() == [3, 3]


def test_gradients_move_into_one_buffer_that_stays(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is gathered afterwards, and no J is allocated after the first step; a parameter that joins makes a new one."""
    allocated: list[tuple[int, ...]] = []
    empty = buckets.huge_pages.empty
    monkeypatch.setattr(buckets.huge_pages, "empty", lambda *s, **o: (allocated.append(s), empty(*s, **o))[1])
    monkeypatch.setattr(buckets, "gathered", None)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        optimizer.pc_backward(model.losses(inputs()))
    assert len(allocated) == 5  # encoder, pair, and one for each head
    assert sum(rows * columns for rows, columns in allocated) == 3 * (6 * 10 + 10 + 10 * 5 + 5) + 2 * 5 + 3 * 6
    optimizer.pc_backward(model.losses(inputs())[:2])
    assert len(allocated) > 5


@pytest.mark.parametrize("values", [torch.ones(3), torch.ones(5, dtype=torch.bfloat16)], ids=["dtype", "shape"])
def test_a_parameter_with_new_values_gets_a_new_buffer(values: Tensor) -> None:
    """`model.float()` and resized embeddings keep the parameter and replace its values."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = PCGrad(torch.optim.SGD([p], lr=0.1))
    optimizer.pc_backward([p.sum(), p.sum()])
    optimizer.zero_grad()
    p.data = values
    optimizer.pc_backward([1.001 * p.sum(), 2.002 * p.sum()])
    torch.testing.assert_close(p.grad, torch.full_like(values, 1.5015))


@pytest.mark.parametrize("weights", ["torchjd:MGDA", lambda gram: gram[0]])
def test_a_reduction_without_effect_is_refused(model: Model, weights: Any) -> None:
    if isinstance(weights, str):
        pytest.importorskip("torchjd.aggregation")
    with pytest.raises(ValueError, match="reduction = 'sum' has no effect on weights that are given"):
        PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", weights=weights)


def test_existing_gradients_survive_a_failing_backward(model: Model) -> None:
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), accumulate=True)
    optimizer.pc_backward(model.losses(inputs()))
    before = {n: p.grad for n, p in model.named_parameters()}
    losses = model.losses(inputs())
    losses[1].backward()
    for n, p in model.named_parameters():
        p.grad = before[n]
    with pytest.raises(RuntimeError, match="a second time"):
        optimizer.pc_backward(losses)
    assert all(p.grad is before[n] for n, p in model.named_parameters())


def test_a_failing_backward_forgets_the_micro_batches_before_it(model: Model) -> None:
    optimizer, fresh = (
        PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    optimizer.pc_backward(model.losses(inputs()), final=False)
    broken = model.losses(inputs())
    broken[1].backward()
    with pytest.raises(RuntimeError, match="a second time"):
        optimizer.pc_backward(broken)
    optimizer.pc_backward(model.losses(inputs()))
    got = [p.grad for p in model.parameters()]
    fresh.pc_backward(model.losses(inputs()))
    assert all(torch.equal(gradient, p.grad) for gradient, p in zip(got, model.parameters(), strict=True))


def test_the_first_and_the_last_loss_may_share_a_graph(model: Model) -> None:
    one, other = inputs()[:2]
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.pc_backward(model.losses([one, other, one]))
    assert optimizer.gram is not None
    assert (optimizer.gram.diagonal() > 0).all()


def test_one_task_is_plain_backward(model: Model) -> None:
    for choices in ({}, TRAINERS):
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), **choices)
        optimizer.zero_grad()
        optimizer.pc_backward(model.losses(inputs())[:1])
        got = [p.grad for p in model.parameters()]
        model.zero_grad()
        model.losses(inputs())[0].backward()
        for p, gradient in zip(model.parameters(), got, strict=True):
            missing = None if choices else torch.zeros_like(p)
            torch.testing.assert_close(gradient, missing if p.grad is None else p.grad)
    assert optimizer.gram is None


def scaled_by_caller(model: Model, scaler: torch.amp.GradScaler, losses: list[Tensor]) -> PCGrad:
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), generator=torch.Generator().manual_seed(0))
    optimizer.zero_grad()
    optimizer.pc_backward([scaler.scale(loss) for loss in losses])
    scaler.step(optimizer)  # type: ignore[arg-type]
    return optimizer


def scaled_inside(model: Model, scaler: torch.amp.GradScaler, losses: list[Tensor]) -> PCGrad:
    generator = torch.Generator().manual_seed(0)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), generator=generator, scaler=scaler)
    optimizer.zero_grad()
    optimizer.pc_backward(losses)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("run", [scaled_by_caller, scaled_inside])
def test_gradscaler_changes_nothing(
    model: Model, run: Callable[[Model, torch.amp.GradScaler, list[Tensor]], PCGrad]
) -> None:
    twin = copy.deepcopy(model)
    plain = PCGrad(torch.optim.SGD(twin.parameters(), lr=0.1), generator=torch.Generator().manual_seed(0))
    plain.pc_backward(twin.losses(inputs()))
    plain.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    run(model, scaler, model.losses(inputs()))
    scaler.update()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("run", [scaled_by_caller, scaled_inside])
def test_gradscaler_skips_a_broken_step(
    model: Model, run: Callable[[Model, torch.amp.GradScaler, list[Tensor]], PCGrad]
) -> None:
    before = [p.clone() for p in model.parameters()]
    losses = model.losses(inputs())
    losses[1] = losses[1] * torch.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = run(model, scaler, losses)
    scaler.update()
    assert all(map(torch.equal, model.parameters(), before))
    assert scaler.get_scale() == 4.0
    assert optimizer.task_weights is not None
    assert optimizer.task_weights.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("by", ["wrapper", "optimizer inside"])
def test_unscaled_gradients_can_be_clipped(by: str) -> None:
    """Named after the bug: `scaler.unscale_` of the wrapper counted for nothing, and the step divided by the scale again."""
    p = nn.Parameter(torch.zeros(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = PCGrad(torch.optim.SGD([p], lr=1.0), scaler=scaler)
    for step in (1, 2):
        optimizer.pc_backward([3 * p[0], 4 * p[1]])  # averaged: 1.5, 2
        scaler.unscale_(optimizer if by == "wrapper" else optimizer.optimizer)  # type: ignore[arg-type]
        assert nn.utils.clip_grad_norm_([p], 1.25).item() == 2.5
        optimizer.step()
        scaler.update()
        torch.testing.assert_close(p.detach(), -step * torch.tensor([0.75, 1.0]))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_closure_reaches_the_gradscaler(enabled: bool) -> None:
    """Named after the bug: with a scaler the closure was dropped, and the step took gradients of zero."""
    p = nn.Parameter(torch.ones(1))
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    optimizer = PCGrad(torch.optim.SGD([p], lr=0.5), scaler=scaler)

    def closure() -> float:
        optimizer.pc_backward([p.sum(), p.sum()])
        return 7.0

    if enabled:
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            optimizer.step(closure)
    else:
        assert optimizer.step(closure) == 7.0
        assert p.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype: torch.dtype) -> None:
    """Gradients come back in the parameters' dtype; bf16 or fp16 parameters may be mixed with fp32 ones."""
    low, high = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype)), nn.Parameter(torch.tensor([3.0]))
    optimizer = PCGrad(torch.optim.SGD([low, high], lr=0.1), "sum")
    optimizer.pc_backward([low.sum() * high.sum().to(dtype), -low[0] * 2 * high.sum().to(dtype)])
    J = torch.tensor([[3.0, 3.0, 3.0], [-6.0, 0.0, -2.0]])
    expected = oracles.pcgrad(J, [[1], [0]])
    assert low.grad is not None
    assert high.grad is not None
    assert (low.grad.dtype, high.grad.dtype) == (dtype, torch.float32)
    got = torch.cat([low.grad.double(), high.grad.double()])
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every second"])
def test_gradients_lie_in_memory_as_their_parameters_do(layout: str, foreseen: bool) -> None:
    """Named after the bug: a fused optimizer, which reads both by address, gave each weight another one's gradient."""
    torch.manual_seed(0)
    laid: Tensor = {
        "channels_last": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 3).T,
        "every second": torch.randn(4, 6)[:, ::2],
    }[layout]
    p, other = nn.Parameter(laid.clone(memory_format=torch.contiguous_format)), nn.Parameter(torch.ones(2))
    optimizer = PCGrad(torch.optim.SGD([other, p], lr=0.1), "sum", weights="none")
    factor = torch.randn_like(p, memory_format=torch.contiguous_format)
    for data in (p.data, laid):  # `model.to(memory_format=...)` between two steps
        p.data = data
        withheld = p.sum() if foreseen else _Without.apply(p, other)
        optimizer.pc_backward([(factor * p).sum() + other.sum(), withheld, p.square().sum()])
        assert p.grad is not None
        torch.testing.assert_close(p.grad, factor + 1 + 2 * p.detach(), check_stride=False)
    found, p.grad = p.grad.stride(), None
    (factor * p).sum().backward()
    assert found == p.grad.stride()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype: torch.dtype) -> None:
    """Named after the bug: the gradient lost its imaginary part. A complex number counts as two real ones."""
    torch.manual_seed(0)
    p, real = nn.Parameter(torch.randn(3, 2, dtype=dtype)), nn.Parameter(torch.ones(2))
    J = torch.randn(2, 3, 2, 2)
    J[1] -= 2 * J[0]
    optimizer = PCGrad(torch.optim.SGD([real, p], lr=0.1), "sum")
    optimizer.pc_backward([(torch.view_as_real(p) * row).sum() for row in J])
    assert p.grad is not None
    assert p.grad.dtype == dtype
    expected = oracles.pcgrad(J.flatten(1), [[1], [0]]).view(3, 2, 2)
    torch.testing.assert_close(torch.view_as_real(p.grad).double(), expected, rtol=1e-5, atol=1e-5)


def test_integer_parameters_get_no_gradient() -> None:
    """Named after the bug: frozen quantized weights among `model.parameters()` ended the optimizer's step."""
    p = nn.Parameter(torch.ones(2))
    quantized = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    optimizer = PCGrad(torch.optim.AdamW([p, quantized], lr=0.1))
    optimizer.pc_backward([p.sum(), p[0]])
    optimizer.step()
    assert quantized.tolist() == [1, 1]


def test_sparse_gradients() -> None:
    table = nn.Embedding(7, 3, sparse=True)
    weight = table.weight
    optimizer = PCGrad(torch.optim.SGD([weight], lr=0.1))
    ids = torch.tensor([1, 4, 4])
    optimizer.pc_backward([table(ids).sum(), -2 * table(ids[1:]).sum()])
    J = torch.zeros(2, 7, 3)
    J[0].index_add_(0, ids, torch.ones(3, 3))
    J[1].index_add_(0, ids[1:], -2 * torch.ones(2, 3))
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.flatten(), oracles.pcgrad(J.flatten(1), [[1], [0]], mean=True).float())


def test_reentrant_checkpointing() -> None:
    """Parameters inside a reentrant checkpoint are not in the outer graph; their gradients are found all the same."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    xs = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    gradients = []
    for reentrant in (True, False):
        optimizer = PCGrad(torch.optim.SGD(layer.parameters(), lr=0.1))
        optimizer.zero_grad()
        losses = [(-1) ** i * checkpoint(layer, x, use_reentrant=reentrant).square().sum() for i, x in enumerate(xs)]
        optimizer.pc_backward(losses)
        assert layer.weight.grad is not None
        gradients.append(layer.weight.grad)
    torch.testing.assert_close(*gradients)


class _Doubled(torch.autograd.Function):
    """2 x; its node has an attribute that the leaves of a graph have, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = 2
        return x * ctx.variable

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.variable


def test_a_function_with_an_attribute_named_variable_is_no_leaf() -> None:
    """Named after the bug: its graph, which both losses share, was freed after the first."""
    p = nn.Parameter(torch.zeros(3))
    shared = _Doubled.apply(p.exp())
    PCGrad(torch.optim.SGD([p], lr=0.1)).pc_backward([shared.sum(), shared[0]])
    assert p.grad is not None
    assert p.grad.tolist() == [2, 1, 1]


def test_compiled_models_work(model: Model) -> None:
    expected = naive(model, inputs(), orders_of(0), mean=False)
    model.encoder = torch.compile(model.encoder, backend="aot_eager")  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", generator=generator, **TRAINERS)
    optimizer.pc_backward(model.losses(inputs()))
    assert_gradients(model, {n: expected[n.replace("_orig_mod.", "")] for n, _ in model.named_parameters()})


@pytest.mark.parametrize(("saved", "loaded"), [("classic", "mgda"), ("classic", "gradvac"), ("gradvac", "classic")])
def test_the_state_of_another_method_is_refused_and_nothing_is_loaded(saved: str, loaded: str) -> None:
    """It ended in a KeyError after the optimizer's state was loaded, or was dropped without a word."""
    parameter = nn.Parameter(torch.ones(3))
    old = PCGrad(torch.optim.SGD([parameter], lr=0.5), weights=saved)
    new = PCGrad(torch.optim.SGD([parameter], lr=0.1), weights=loaded)
    with pytest.raises(ValueError, match=r"the state of another method of surgery: it has .*, expected"):
        new.load_state_dict(old.state_dict())
    assert new.optimizer.param_groups[0]["lr"] == 0.1


def test_state_dict_resumes_optimizer_and_orders(model: Model) -> None:
    def train(model: Model, optimizer: PCGrad, steps: int) -> list[Tensor]:
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.pc_backward(model.losses(inputs()))
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    optimizer = PCGrad(torch.optim.Adam(model.parameters()), generator=torch.Generator().manual_seed(5))
    train(model, optimizer, 2)
    twin, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    resumed = PCGrad(torch.optim.Adam(twin.parameters()))
    resumed.load_state_dict(state)
    assert all(map(torch.equal, train(model, optimizer, 3), train(twin, resumed, 3)))


def test_other_methods_fit(model: Model) -> None:
    for method in ("mgda", surgery.weights("cagrad", "mean"), lambda gram: torch.full_like(gram[0], 2.0)):
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), weights=method)
        optimizer.zero_grad()
        optimizer.pc_backward(model.losses(inputs()))
        weight = model.encoder[0].weight
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
    plain = torch.autograd.grad(sum(model.losses(inputs())), weight)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(weight.grad, 2 * plain)


def test_schedulers_see_the_optimizer_inside(model: Model) -> None:
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, step_size=1, gamma=0.5)
    optimizer.pc_backward(model.losses(inputs()))
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([], "at least one loss"),
        ([torch.ones(1)], r"losses\[0\] must be a scalar tensor that requires a gradient"),
        ([torch.ones(2, requires_grad=True)], r"losses\[0\] must be a scalar"),
        ([3.0], r"losses\[0\] must be a scalar"),
        ([torch.ones((), requires_grad=True) * 1 for _ in range(65)], "1 to 64 tasks"),
    ],
)
def test_refusals(losses: list[Tensor], message: str) -> None:
    p = nn.Parameter(torch.ones(3))
    if len(losses) > 64:
        losses = [p.sum() * i for i in range(len(losses))]
    with pytest.raises(ValueError, match=message):
        PCGrad(torch.optim.SGD([p], lr=0.1)).pc_backward(losses)
    for options, expected in (
        ({"weights": "none at all"}, "expected one of none, pcgrad"),
        ({"reduction": "total"}, 'expected "mean" or "sum"'),
        ({"scope": "heads"}, 'expected "all" or "shared"'),
    ):
        with pytest.raises(ValueError, match=expected):
            PCGrad(torch.optim.SGD([p], lr=0.1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrapped", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_parameters_are_refused(wrapped: str) -> None:
    """Each process would find other conflicts in its part of the gradients."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    alone: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("gloo", **alone)
    try:
        model: Any = nn.Linear(6, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more = {} if wrapped == "fully_shard" else {"device_id": torch.device("cpu")}
            model = getattr(fsdp, wrapped)(model, **more)
            optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
            losses = model(torch.randn(4, 6)).square().mean(0).unbind()
        with pytest.raises(ValueError, match="pc_backward needs whole parameters: FSDP"):
            optimizer.pc_backward(losses)
    finally:
        torch.distributed.destroy_process_group()
