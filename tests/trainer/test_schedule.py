# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules against explicit values and torch's schedulers."""

from __future__ import annotations

import math

import pytest
import torch

from minbert_fast.recipes.sections import OptimizerOptions
from minbert_fast.trainer.schedule import lr_scale


def scales(steps: int, per_epoch: int, **options: object) -> list[float]:
    return [lr_scale(s, steps, per_epoch, OptimizerOptions(**options)) for s in range(steps)]  # type: ignore[arg-type]


def test_linear_warms_up_and_decays_to_almost_zero() -> None:
    found = scales(10, 10, warmup=0.4)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_share_of_the_steps_is_rounded_to_the_nearest_step() -> None:
    """0.1 of 17 steps is 2; 0.29 of 100 is 29, though the product is slightly less."""
    assert scales(17, 17, warmup=0.1)[:4] == pytest.approx([1 / 3, 2 / 3, 1.0, 14 / 15])
    assert scales(100, 100, warmup=0.29, schedule="constant").index(1.0) == 29


def test_without_warmup_the_first_step_has_the_full_rate() -> None:
    for schedule in ("linear", "cosine", "exponential", "constant"):
        assert scales(7, 3, warmup=0.0, schedule=schedule)[0] == 1.0


def test_cosine_equals_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    expected = []
    for _ in range(12):
        expected.append(torchs.get_last_lr()[0])
        optimizer.step()
        torchs.step()
    assert scales(12, 4, warmup=0.0, schedule="cosine") == pytest.approx(expected, abs=1e-12)


def test_exponential_falls_once_an_epoch() -> None:
    found = scales(9, 3, warmup=0.0, schedule="exponential", gamma=0.5)
    assert found == [1.0] * 3 + [0.5] * 3 + [0.25] * 3
    found = scales(9, 3, warmup=1 / 9, schedule="exponential", gamma=0.5)
    assert found == [0.5, 1.0, 1.0] + [0.5] * 3 + [0.25] * 3, "epochs count from the first step, warm-up included"


def test_constant_keeps_the_full_rate() -> None:
    assert scales(5, 5, warmup=0.2, schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 17, 1000])
def test_every_step_trains_with_at_most_the_full_rate(schedule: str, warmup: float, steps: int) -> None:
    found = scales(steps, max(steps // 3, 1), warmup=warmup, schedule=schedule)
    assert all(0 < x <= 1 and math.isfinite(x) for x in found)


def test_steps_after_the_end_have_rate_zero() -> None:
    assert lr_scale(10, 10, 10, OptimizerOptions()) == lr_scale(15, 10, 10, OptimizerOptions()) == 0.0
    assert lr_scale(99, 10, 10, OptimizerOptions(schedule="cosine")) == pytest.approx(0.0)
