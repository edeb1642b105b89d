# SPDX-License-Identifier: Apache-2.0
"""Dynamic task weights: against the papers' formulas written out, in either step, restored, and without a question."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast.common.schema import ConfigError
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.recipes.sections import WeightingOptions
from minbert_fast.step.backends import make_step
from minbert_fast.step.extras.weighting import DynamicAverage, Famo, TaskWeights, Uncertainty, task_weights
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.trainer.job import Options, train
from tests.small import read_records, small_data
from tests.step.test_graph import computed_on_meta
from tests.step.test_step import SIZES, make_batch, make_model, recipe

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS = ("a", "b", "c")
CPU = torch.device("cpu")
NO = torch.tensor(False)
METHODS: dict[str, dict[str, Any]] = {
    "uncertainty": {"method": "uncertainty", "lr": 0.3},
    "dwa": {"method": "dwa", "window": 2, "temperature": 0.7},
    "famo": {"method": "famo", "logit_lr": 0.3, "logit_decay": 0.01},
    "random": {"method": "random"},
}


def draw(steps: int) -> Tensor:
    return 0.2 + torch.rand(steps, len(TASKS), generator=torch.Generator().manual_seed(1))


# ---- The formulas --------------------------------------------------------------------------------------------------------


def test_uncertainties_descend_on_the_papers_objective() -> None:
    """Autograd on sum of exp(-s) L + s / 2, in fp64."""
    losses = draw(20)
    weighting = Uncertainty(WeightingOptions("uncertainty", lr=0.1), TASKS, CPU)
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for row in losses:
        torch.testing.assert_close(weighting.loss_weights().double(), torch.exp(-s.detach()), rtol=1e-5, atol=1e-6)
        (gradient,) = torch.autograd.grad((torch.exp(-s) * row.double() + s / 2).sum(), s)
        s = (s - 0.1 * gradient).detach().requires_grad_()
        weighting.after_update(row, TASKS, NO)
    assert (weighting.loss_weights() - 1).abs().min() > 0.1


def test_uncertainties_come_to_rest_where_each_loss_weighs_one_half() -> None:
    losses = torch.tensor([0.05, 1.5, 4.0])
    weighting = Uncertainty(WeightingOptions("uncertainty", lr=0.5), TASKS, CPU)
    for _ in range(200):
        weighting.after_update(losses, TASKS, NO)
    torch.testing.assert_close(weighting.loss_weights() * losses, torch.full((3,), 0.5))


def test_weights_average_dynamically_as_the_paper_has_it() -> None:
    window, temperature = 3, 2.0
    losses = draw(5 * window)
    weighting = DynamicAverage(WeightingOptions("dwa", window=window, temperature=temperature), TASKS, CPU)
    for step, row in enumerate(losses):
        weighting.before_step(step)
        n = step // window
        expected = [1.0, 1.0, 1.0]
        if n >= 2:
            means = [losses[i * window : (i + 1) * window].double().mean(0).tolist() for i in (n - 1, n - 2)]
            powers = [math.exp(now / then / temperature) for now, then in zip(*means, strict=True)]
            expected = [3 * power / sum(powers) for power in powers]
        torch.testing.assert_close(weighting.loss_weights(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
        weighting.after_update(row, TASKS, NO)
    assert weighting.loss_weights().std() > 0


def test_a_task_without_examples_in_a_window_keeps_its_mean() -> None:
    """And its ratio is 1 until it has two means."""
    weighting = DynamicAverage(WeightingOptions("dwa", window=1), TASKS, CPU)
    rows, ratios = (
        torch.tensor([[1.0, 2.0, 9.0], [3.0, 2.0, 5.0], [6.0, 1.0, 9.0]]),
        {2: [3.0, 1.0, 1.0], 3: [2.0, 0.5, 1.0]},
    )
    for step in range(4):
        weighting.before_step(step)
        if step in ratios:
            powers = [math.exp(ratio / weighting.options.temperature) for ratio in ratios[step]]
            expected = torch.tensor([3 * power / sum(powers) for power in powers])
            torch.testing.assert_close(weighting.loss_weights(), expected)
        if step < 3:
            weighting.after_update(rows[step], TASKS if step == 1 else TASKS[:2], NO)


LOSSES = {
    "random": lambda: draw(12),
    "one task stands still": lambda: draw(12) * torch.tensor([1.0, 0.0, 1.0]) + torch.tensor([0.0, 0.5, 0.0]),
    "a zero loss": lambda: draw(12) * torch.tensor([1.0, 0.0, 1.0]),
    "huge and tiny": lambda: draw(12) * torch.tensor([1e6, 1.0, 1e-6]),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_famo_is_the_papers_algorithm(kind: str) -> None:
    """Algorithm 1 in fp64, with autograd's Jacobian of the softmax and torch's Adam."""
    losses = LOSSES[kind]()
    weighting = Famo(WeightingOptions("famo", logit_lr=0.1, logit_decay=0.01), TASKS, CPU)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1, weight_decay=0.01)
    for before, after in zip(losses[0::2], losses[1::2], strict=True):
        weighting.before_weights(before.clone(), TASKS)
        z = torch.softmax(logits, 0)
        expected = z / (before.double() + 1e-8)
        expected = (expected / expected.sum()).detach()
        torch.testing.assert_close(weighting.loss_weights().double(), expected, rtol=1e-4, atol=1e-6)
        change = torch.log(before.double() + 1e-8) - torch.log(after.double() + 1e-8)
        (logits.grad,) = torch.autograd.grad(z, logits, change)
        adam.step()
        weighting.remeasured(after, TASKS, NO)
        torch.testing.assert_close(weighting.logits.double(), logits.detach(), rtol=1e-4, atol=2e-5)
    assert weighting.logits.std() > 0.01


def test_famo_is_torchjds() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    theirs = scalarization.FAMO(3)
    weighting = Famo(WeightingOptions("famo"), TASKS, CPU)
    losses = draw(40)
    for before, after in zip(losses[0::2], losses[1::2], strict=True):
        values = before.clone().requires_grad_()
        (expected,) = torch.autograd.grad(theirs(values), values)
        theirs.update(after)
        weighting.before_weights(before.clone(), TASKS)
        torch.testing.assert_close(weighting.loss_weights(), expected, rtol=1e-4, atol=1e-6)
        weighting.remeasured(after, TASKS, NO)


def test_a_broken_loss_leaves_famos_other_weights_alone() -> None:
    weighting, two = (Famo(WeightingOptions("famo"), TASKS, CPU) for _ in range(2))
    weighting.before_weights(torch.tensor([0.5, torch.nan, 2.0]), TASKS)
    two.before_weights(torch.tensor([0.5, 7.0, 2.0]), ("a", "c"))
    assert torch.equal(weighting.loss_weights(), two.loss_weights())
    assert weighting.loss_weights()[1] == 0
    weighting.before_weights(torch.full((3,), torch.inf), TASKS)
    assert torch.equal(weighting.loss_weights(), torch.zeros(3))


@pytest.mark.parametrize("c", ["absent", "broken after the update"])
def test_famo_moves_as_if_there_were_no_absent_task(c: str) -> None:
    """Named after the bug: a task alone in many steps, as in the rest of a longer data set, lost its weight."""
    two, three = (Famo(WeightingOptions("famo", logit_lr=0.1), tasks, CPU) for tasks in (TASKS[:2], TASKS))
    present = TASKS[:2] if c == "absent" else TASKS
    losses = draw(20)
    for before, after in zip(losses[0::2], losses[1::2], strict=True):
        two.before_weights(before[:2].clone(), TASKS[:2])
        two.remeasured(after[:2], TASKS[:2], NO)
        three.before_weights(before.clone(), present)
        three.remeasured(torch.tensor([*after[:2], torch.nan]), present, NO)
        assert three.logits[2] == three.mean[2] == three.square[2] == 0
        torch.testing.assert_close(three.logits[:2], two.logits)
    assert two.logits.std() > 0.1
    alone = Famo(WeightingOptions("famo", logit_decay=0.0), TASKS, CPU)
    for before, after in zip(losses[0::2], losses[1::2], strict=True):
        alone.before_weights(before.clone(), TASKS[:1])
        alone.remeasured(after, TASKS[:1], NO)
    assert not alone.logits.any()


@pytest.mark.parametrize(("broken", "skipped"), [(None, True), (torch.nan, False), (torch.inf, False)])
def test_famo_learns_nothing_from_a_step_that_broke_or_was_skipped(broken: float | None, skipped: bool) -> None:
    """Of one loss that broke after the update, the logit stays; of a skipped step all do, and Adam's moments."""
    weighting = Famo(WeightingOptions("famo", logit_decay=0.0), TASKS, CPU)
    weighting.before_weights(torch.tensor([0.5, 1.0, -2.0]), TASKS)
    assert weighting.loss_weights().isfinite().all()
    after = torch.tensor([0.4, 0.9, 2.0])
    after[1] = 0.9 if broken is None else broken
    weighting.remeasured(after, TASKS, torch.tensor(skipped))
    if skipped:
        assert not torch.stack(list(weighting.state.values())).any()
    assert torch.stack(list(weighting.state.values())).isfinite().all()


def test_random_weights_are_the_papers_and_new_in_every_step() -> None:
    """A softmax of normal numbers: by symmetry each mean is 1 / T; without the draw they would not vary."""
    one, other, again = (task_weights(WeightingOptions("random"), TASKS, CPU, seed) for seed in (5, 6, 5))
    drawn = []
    for step in range(2000):
        one.before_step(step)
        drawn.append(one.loss_weights().clone())
    seen = torch.stack(drawn)
    torch.testing.assert_close(seen.sum(1), torch.ones(2000))
    torch.testing.assert_close(seen.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    normal = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    torch.testing.assert_close(seen.std(0), normal.std(0), atol=0.02, rtol=0)
    other.before_step(7)
    again.before_step(7)
    assert torch.equal(again.loss_weights(), seen[7])
    assert not torch.equal(other.loss_weights(), seen[7])


@pytest.mark.parametrize("method", METHODS)
def test_absent_tasks_and_skipped_steps_do_not_count(method: str) -> None:
    weighting = task_weights(WeightingOptions(**METHODS[method]), TASKS, CPU)
    only = task_weights(WeightingOptions(**METHODS[method]), TASKS, CPU)
    assert weighting is not None
    assert only is not None
    for step, row in enumerate(draw(8)):
        for each in (weighting, only):
            each.before_step(step)
        if step % 2:
            broken = torch.full((3,), torch.nan)
            weighting.before_weights(broken, TASKS)
            weighting.after_update(broken, TASKS, torch.tensor(True))
            weighting.remeasured(broken, TASKS, torch.tensor(True))
            continue
        present = TASKS[:2]
        for each, last in ((weighting, 0.0), (only, 123.0)):
            losses = row.clone()
            losses[2] = last
            each.before_weights(losses, present)
            each.after_update(losses, present, NO)
            each.remeasured(losses * torch.tensor([0.5, 1.0, 0.1]), present, NO)
    for each in (weighting, only):
        each.before_weights(torch.tensor([0.3, 0.4, 0.5]), TASKS)
    assert torch.equal(weighting.loss_weights(), only.loss_weights())
    assert weighting.loss_weights().isfinite().all()
    if method == "uncertainty":
        assert weighting.loss_weights()[2] == 1


# ---- In the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "surgery"), [("uncertainty", "none"), ("famo", "none"), *((method, "pcgrad") for method in METHODS)]
)
def test_steps_with_dynamic_weights_equal_the_reference_path(method: str, surgery: str) -> None:
    chosen = recipe(surgery={"method": surgery}, weighting=METHODS[method])
    fast_model = make_model(chosen)
    slow_model = copy.deepcopy(fast_model)
    fast = make_step("fast", fast_model, chosen, torch.float32)
    slow = make_step("reference", slow_model, chosen, torch.float32)
    for index in range(6):
        sizes = SIZES | {"paraphrase": 0} if index == 1 else SIZES
        batch = make_batch(fast_model, sizes, seed=index)
        a, b = fast(batch, 1.0), slow(batch, 1.0)
        assert a.task_weights is not None
        assert b.task_weights is not None
        torch.testing.assert_close(a.losses, b.losses, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(a.task_weights, b.task_weights, atol=1e-4, rtol=1e-4)
    assert (a.task_weights - a.task_weights.mean()).abs().max() > 1e-3
    for (name, p), q in zip(fast_model.named_parameters(), slow_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=3e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("backend", ["fast", "reference"])
def test_famo_measures_twice_under_the_same_dropout(backend: Any) -> None:
    """At learning rate 0 the weights stay, so the second measurement gives the losses of the first."""
    dropout = {"sentiment": {"dropout": 0.5}, "paraphrase": {"dropout": 0.5}, "similarity": {}}
    chosen = recipe(tasks=dropout, weighting=METHODS["famo"])
    model = make_model(chosen)
    step = make_step(backend, model, chosen, torch.float32)
    (famo,) = (hook for hook in step.hooks if isinstance(hook, Famo))  # type: ignore[attr-defined]
    again: list[Tensor] = []
    famo.remeasured = lambda losses, present, skipped: again.append(losses.clone())  # type: ignore[method-assign]
    result = step(make_batch(model, SIZES), 0.0)
    torch.testing.assert_close(again[0], result.losses)


def test_weights_scale_the_rows_of_j_the_heads_and_the_gram_matrix() -> None:
    chosen = recipe(surgery={"method": "pcgrad"}, weighting={"method": "uncertainty"}, model={"pooling": "pooler"})
    plain = recipe(surgery={"method": "pcgrad"}, model={"pooling": "pooler"})
    steps = []
    for each in (plain, chosen):
        model = make_model(each)
        step = OnePassStep(model, each, torch.float32)
        for weighting in (hook for hook in step.hooks if isinstance(hook, TaskWeights)):
            weighting.state["log_variances"].copy_(torch.tensor([0.5, -1.0, 2.0]))
        steps.append((step, step(make_batch(model, SIZES), 1.0)))
    (one, a), (two, b) = steps
    factors = torch.exp(-torch.tensor([0.5, -1.0, 2.0]))
    assert torch.equal(a.losses, b.losses)
    torch.testing.assert_close(two.gradients.J, one.gradients.J * factors[:, None], rtol=1e-4, atol=1e-6)
    assert a.gram is not None
    assert b.gram is not None
    torch.testing.assert_close(b.gram, a.gram * factors * factors[:, None], rtol=1e-3, atol=1e-6)
    for task, factor in zip(SIZES, factors, strict=True):
        for p, q in zip(one.heads[task], two.heads[task], strict=True):
            assert p.grad is not None
            torch.testing.assert_close(q.grad, p.grad * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["fast", "reference"])
@pytest.mark.parametrize("method", METHODS)
def test_restored_weights_go_on_bit_for_bit(method: str, backend: Any) -> None:
    """Cut within a window, and between two."""
    chosen = recipe(weighting=METHODS[method])

    saved: dict[int, Any] = {}

    def run(first: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of the steps from `first` on, and the last parameters."""
        model = make_model(chosen)
        if first:
            model.load_state_dict(saved[first][1])
        step = make_step(backend, model, chosen, torch.float32)
        if first:
            step.load_state_dict(saved[first][0])
        seen = []
        for index in range(first, 6):
            saved.setdefault(index, copy.deepcopy((step.state_dict(), model.state_dict())))
            found = step(make_batch(model, SIZES, seed=index), 1.0).task_weights
            assert found is not None
            seen.append(found.clone())
        return seen, [p.detach() for p in model.parameters()]

    weights, parameters = run(0)
    for cut in (3, 4):
        again, others = run(cut)
        assert all(torch.equal(x, y) for x, y in zip(weights[cut:], again, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(parameters, others, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_weighting_asks_the_device_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert computed_on_meta(recipe(weighting=METHODS[method]), SIZES, monkeypatch) == []


# ---- Recipes -------------------------------------------------------------------------------------------------------------


def test_a_run_logs_its_weights_and_the_report_draws_them(tmp_path: Path) -> None:
    quick: dict[str, Any] = {
        "data": {"directory": str(small_data(tmp_path / "data")), "cache": str(tmp_path / "cache")},
        "training": {"batch_size": 20, "epochs": 3, "evaluate_untrained": False, "precision": "fp32"},
        "logging": {"every": 1},
        "weighting": {"window": 0},
    }
    chosen = Recipe.load("wish-weight-averaging").with_values(quick, "test")
    output = train(chosen, Options(tmp_path / "run", device="cpu"))
    records = read_records(output)
    weights = [[record[f"weight/{task}"] for task in chosen.tasks] for record in records]
    assert weights[:4] == [[1.0] * 3] * 4  # two epochs of two steps
    assert weights[4] != [1.0] * 3
    assert sum(weights[4]) == pytest.approx(3)
    assert (output / "plots" / "weights.svg").is_file()


def test_the_wished_for_recipes_weigh_dynamically() -> None:
    methods = {name: Recipe.load(f"wish-{name}").weighting.method for name in ("uncertainty", "weight-averaging")}
    assert methods == {"uncertainty": "uncertainty", "weight-averaging": "dwa"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr = -1.0: expected 0 or more"),
        ({"temperature": 0.0}, "temperature = 0.0: expected above 0"),
        ({"window": -1}, "window = -1: expected 0 or more"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe().with_values({"weighting": values}, "test")
    assert message in str(raised.value)
