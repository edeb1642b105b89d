# SPDX-License-Identifier: Apache-2.0
"""Averaged weights equal the written-out sum in both steps; a run evaluates, saves and resumes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.recipes.sections import TrainingOptions
from minbert_fast.step.backends import make_step
from minbert_fast.step.extras.averaging import WeightAverage
from minbert_fast.step.flat import ParameterSpec
from minbert_fast.trainer import loop, plan
from tests.step.test_graph import computed_on_meta
from tests.step.test_step import SIZES, four_steps, make_batch, make_model, recipe
from tests.trainer.test_loop import RECIPE, RETURNING, STAGED, Run, StandIn, killed_anywhere

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ("fast", "reference")


def written_out(decay: float, after: list[Tensor]) -> Tensor:
    """(1 - d) / (1 - d^n) * sum of d^(n - i) x_i, in fp64."""
    n = len(after)
    total = sum((decay ** (n - i) * x.double() for i, x in enumerate(after, 1)), torch.zeros(()))
    return (1 - decay) / (1 - decay**n) * total


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_the_average_is_its_formula_and_skipped_steps_do_not_count(decay: float) -> None:
    p = nn.Parameter(torch.randn(33))
    average = WeightAverage.of_parameters(decay, [ParameterSpec("p", p)])
    assert average is not None
    after = []
    for step in range(9):
        with torch.no_grad():
            p += torch.randn(33)
        skipped = step in (0, 4)
        average.after_update(torch.zeros(0), [], torch.tensor(skipped))
        if not skipped:
            after.append(p.detach().clone())
            expected = written_out(decay, after)
            torch.testing.assert_close(average.state_dict()["p/average"].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_averages_what_it_trains_and_leaves_training_as_it_is(backend: Any) -> None:
    chosen, plain = recipe(training={"ema": 0.8}), recipe()
    model, other = make_model(chosen), make_model(plain)
    step, without = make_step(backend, model, chosen, torch.float32), make_step(backend, other, plain, torch.float32)
    after = []
    for index in range(6):
        batch = make_batch(model, SIZES, seed=index)
        if index == 3:
            batch.labels["similarity"][0] = float("nan")
        for each in (step, without):
            each(batch, 1.0)
        if index != 3:
            after.append(weights_of(model))
    assert torch.equal(weights_of(model), weights_of(other))
    own = weights_of(model)
    assert step.average is not None
    with step.average.applied():
        torch.testing.assert_close(weights_of(model).double(), written_out(0.8, after), atol=1e-6, rtol=1e-5)
        assert not torch.equal(weights_of(model), own)
    assert torch.equal(weights_of(model), own)


def test_the_models_own_weights_come_back_after_a_failure() -> None:
    p = nn.Parameter(torch.ones(3))
    average = WeightAverage.of_parameters(0.5, [ParameterSpec("p", p)])
    assert average is not None
    with torch.no_grad():
        p.fill_(5.0)

    def fail() -> None:
        assert average is not None
        with average.applied():
            assert (p == 1).all()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (p == 5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restored_average_goes_on_bit_for_bit(backend: Any) -> None:
    chosen = recipe(training={"ema": 0.9}, surgery={"method": "pcgrad"})

    def run(cut: bool) -> Tensor:
        model, step = four_steps(backend, chosen, cut)
        step.average.adopt()
        return weights_of(model)

    assert torch.equal(run(True), run(False))


def test_a_checkpoint_without_the_average_is_refused() -> None:
    chosen = recipe(training={"ema": 0.9})
    state = make_step("fast", make_model(recipe()), recipe(), torch.float32).state_dict()
    with pytest.raises(ValueError, match=r"no .*/average of shape"):
        make_step("fast", make_model(chosen), chosen, torch.float32).load_state_dict(state)


def test_averaging_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert computed_on_meta(recipe(training={"ema": 0.9}), SIZES, monkeypatch) == []


# ---- In the loop ---------------------------------------------------------------------------------------------------------


class Averaging(StandIn):
    """The loop's stand-in for a step, with its weights averaged."""

    def __init__(self, run: AveragingRun) -> None:
        super().__init__(run.model)
        self.run = run
        self.average: Any = WeightAverage.of_parameters(0.5, [ParameterSpec("weight", run.model.weight)])

    def __call__(self, batch: Any, lr_scale: float) -> Any:
        result = super().__call__(batch, lr_scale)
        self.average.after_update(result.losses, [], result.nonfinite.any())
        self.run.after[self.run.trainer.state.step + 1] = self.model.weight.detach().clone()
        return result

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"tensors": state["tensors"] | self.average.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.average.load_state_dict(state["tensors"])


class AveragingRun(Run):
    """A run with it that notes the weights after each step, and those that were judged."""

    def go(self, resume: bool = False) -> loop.Outcome:
        self.after: dict[int, Tensor] = {}
        self.judged: dict[int, Tensor] = {}
        self.begun: list[Tensor] = []
        return super().go(resume)

    def build_step(self) -> StandIn:
        self.begun.append(self.model.weight.detach().clone())
        return Averaging(self)

    def evaluate(self) -> plan.Evaluation:
        self.judged[self.trainer.state.step] = self.model.weight.detach().clone()
        return super().evaluate()


def test_a_run_judges_and_keeps_the_average_and_the_next_stage_starts_from_it(tmp_path: Path) -> None:
    run = AveragingRun(tmp_path, STAGED)
    run.go()
    first = [run.after[step] for step in range(1, 5)]
    second = [run.after[step] for step in range(5, 11)]
    expected = {3: first[:3], 4: first, 6: second[:2], 9: second[:5], 10: second}
    for step, after in expected.items():
        torch.testing.assert_close(run.judged[step].double(), written_out(0.5, after), atol=1e-5, rtol=1e-5)
    assert torch.equal(run.begun[1], run.judged[4])
    assert json.loads((tmp_path / "last" / "weight.json").read_text()) == run.judged[10].tolist()


def test_a_stage_that_starts_from_earlier_weights_has_those(tmp_path: Path) -> None:
    """Not the average of the stage before, which is adopted first."""
    run = AveragingRun(tmp_path, RETURNING)
    run.go()
    assert torch.equal(run.begun[2], run.judged[7])  # the end of the first stage
    assert torch.equal(run.begun[3], torch.arange(4.0))


def test_a_run_that_aborts_leaves_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Averaging, "broken", frozenset(range(5, 99)))
    run = AveragingRun(tmp_path, RECIPE | {"training": {"epochs": 3, "max_skipped": 2}})
    with pytest.raises(RunError):
        run.go()
    assert json.loads((tmp_path / "last" / "weight.json").read_text()) == run.judged[4].tolist()


@pytest.mark.ci
def test_an_averaged_run_killed_anywhere_ends_as_if_never_killed(tmp_path: Path) -> None:
    killed_anywhere(AveragingRun, tmp_path, STAGED)


@pytest.mark.parametrize("cut", [2, 5])
def test_an_averaged_run_cut_short_keeps_the_average_and_goes_on(tmp_path: Path, cut: int) -> None:
    whole = AveragingRun(tmp_path / "whole", RECIPE)
    whole.go()
    first = AveragingRun(tmp_path / "cut", RECIPE, stop_after=cut)
    first.go()
    kept = json.loads((tmp_path / "cut" / "last" / "weight.json").read_text())
    assert kept == first.judged[cut].tolist() != first.after[cut].tolist()
    second = AveragingRun(tmp_path / "cut", RECIPE)
    second.go(resume=True)
    assert (second.files(), second.records()) == (whole.files(), whole.records())


def test_the_wished_for_recipe_averages() -> None:
    assert Recipe.load("wish-ema").training.ema == 0.99
    with pytest.raises(ConfigError, match=r"ema = 1\.0: expected 0 <= ema < 1"):
        TrainingOptions(ema=1.0)
