# SPDX-License-Identifier: Apache-2.0
"""The course's AdamW: its own check, the reference, and what any torch optimizer must do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minbert_fast import AdamW
from minbert_fast.step import naive


def trained(optimizer: type[torch.optim.Optimizer], steps: int, dtype: torch.dtype, **settings: float) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(dtype)
    x, y = torch.randn(16, 5, dtype=dtype), torch.randn(16, 2, dtype=dtype)
    optim = optimizer(model.parameters(), **settings)  # type: ignore[call-arg]
    for _ in range(steps):
        optim.zero_grad()
        (model(x) - y).square().mean().backward()
        optim.step()
    return model


def test_the_courses_own_check() -> None:
    """1,000 steps on Linear(3, 2); the course ships the expected weights, so does this test (to its tolerance)."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, correct_bias=True)
    twin = copy.deepcopy(model)
    checker = naive.AdamW(twin.parameters(), lr=1e-3, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        x = torch.from_numpy(rng.uniform(size=[3])).float()
        target = torch.stack([x[0] + x[1], -x[2]])
        for net, optim in ((model, optimizer), (twin, checker)):
            optim.zero_grad()
            (net(x) - target).square().sum().backward()
            optim.step()
    expected = torch.tensor([[0.5548, 0.8667, 0.0729], [-0.4472, -0.2951, -0.2717]])
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.weight, twin.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"correct_bias": False}, {"lr": 0.1, "eps": 1e-3}])
def test_equals_the_reference(settings: dict[str, float]) -> None:
    ours = trained(AdamW, 12, torch.float64, **settings)
    theirs = trained(naive.AdamW, 12, torch.float64, **settings)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_learning_rate_may_be_a_tensor() -> None:
    """As in torch.optim.AdamW. Named after the bug: the first step ended in an error about packed scalars."""
    made = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.tensor([1.0, -2.0, 3.0])
        AdamW([p], lr=lr, weight_decay=0.1).step()  # type: ignore[arg-type]
        made.append(p)
    assert torch.equal(*made)


def test_is_bitwise_deterministic() -> None:
    first, second = (trained(AdamW, 5, torch.float32) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_schedulers_closures_and_late_parameters() -> None:
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = AdamW([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (a * a).sum()  # b has no gradient yet: it must stay, and later start from step 1
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert torch.equal(b, torch.ones(4))
    torch.testing.assert_close(a.detach(), torch.full((4,), 0.5), atol=1e-3, rtol=0)
    schedule.step()
    before = a.detach().clone()
    optimizer.step(closure)
    assert torch.equal(a, before)
    b.grad = torch.ones(4)
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    torch.testing.assert_close(b.detach(), torch.full((4,), 0.9), atol=1e-3, rtol=0)


def test_state_round_trip_continues_bit_identically() -> None:
    def run(split: bool) -> Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(9))
        optimizer = AdamW([p], weight_decay=0.01)
        for step in range(6):
            if split and step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = AdamW([p], weight_decay=0.01)
                optimizer.load_state_dict(saved)
            p.grad = torch.sin(p.detach() + step)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(split=True), run(split=False))


def test_grad_scaler_unscales_and_skips() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer, scaler = AdamW([p], lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale((p * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9), atol=1e-4, rtol=0)
    p.grad = torch.tensor([float("inf"), 0.0, 0.0])
    before = p.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(p, before)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"eps": -1e-9}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdamW([p], **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdamW([{"params": [p], **settings}])


@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_another_update_in_a_group_or_a_state_is_refused(name: str) -> None:
    """Groups kept the flag, and the update was AdamW's all the same."""
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{name} = True: this AdamW has no {name}"):
        AdamW([{"params": [p], name: True}])
    p.grad = torch.ones(3)
    theirs = torch.optim.AdamW([p], **{name: True})  # type: ignore[arg-type]
    theirs.step()
    with pytest.raises(ValueError, match=f"{name} = True: this AdamW has no {name}"):
        AdamW([p]).load_state_dict(theirs.state_dict())


def test_the_state_of_torchs_adamw_goes_on() -> None:
    """Its first step afterwards ended in KeyError: 'correct_bias'. With eps = 0 both take the same steps."""
    models = [nn.Linear(5, 3, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    theirs = torch.optim.AdamW(models[0].parameters(), lr=0.1, eps=0.0, weight_decay=0.0)
    ours = AdamW(models[1].parameters(), lr=0.1, eps=0.0, weight_decay=0.0)
    for step in range(6):
        x = torch.randn(4, 5, dtype=torch.float64)
        for model in models[: 1 if step < 3 else 2]:
            model.zero_grad()
            model(x).square().mean().backward()
        theirs.step()
        if step < 3:
            models[1].load_state_dict(models[0].state_dict())
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        else:
            ours.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_refused_step_changes_nothing() -> None:
    """A sparse gradient was refused after the parameters before it had counted the step."""
    dense, sparse = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([dense, sparse])
    dense.grad, sparse.grad = torch.ones(2), torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()
    assert not optimizer.state
    assert (dense == 1).all()
