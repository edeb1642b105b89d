# SPDX-License-Identifier: Apache-2.0
"""SMART: the ascent against plain autograd in fp64, the teacher against its sum written out, both as part of a step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.batch import MultitaskBatch, StepTotals
from minbert_fast.model.bert import BertModel
from minbert_fast.model.config import BertConfig
from minbert_fast.model.passes import AutogradPass
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.captured import GraphedStep
from minbert_fast.step.extras.consistency import Adversary, Consistency, second_copies
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import ConsistencyLoss, MultitaskModel, build_tasks
from minbert_fast.tasks.consistency import divergence, split_copies
from tests.small import error_line, small_data, small_run
from tests.step.test_graph import strangers
from tests.step.test_r_drop import twice, unlike_twins
from tests.step.test_step import CONFIG, PLAIN, SIZES, make_batch, make_model, recipe

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"smart": 2.0, "noise": 0.02, "step": 0.3, "radius": 0.1}


def step_of(chosen: Recipe) -> OnePassStep:
    return OnePassStep(make_model(chosen), chosen, torch.float32)


def consistency_of(step: OnePassStep) -> Consistency:
    return next(hook for hook in step.hooks if isinstance(hook, Consistency))


def noise_of(step: OnePassStep, batch: MultitaskBatch, seed: int = 5) -> Tensor:
    assert consistency_of(step).adversary is not None
    torch.manual_seed(seed)
    step.model.train()
    return consistency_of(step).adversary.noise(batch, batch.packed.task_tokens, step.seed)


class Perturbed(AutogradPass):
    """The encoder by ordinary autograd, with something added to its embeddings."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__()
        self.noise = noise

    def embed(self, rows: Any, parts: Any) -> Tensor:
        return super().embed(rows, parts) + self.noise


def apart(model: MultitaskModel, batch: MultitaskBatch, noise: Tensor) -> Tensor:
    """The divergences of the tasks in all, by ordinary autograd."""
    hidden = model.encoder.encode_packed(Perturbed(noise), batch.packed)
    outputs = model.outputs(batch, hidden)
    return torch.stack([divergence(model.head(name), *split_copies(outputs[name])) for name in batch.tasks]).sum()


# ---- The adversary -------------------------------------------------------------------------------------------------------


def test_second_copies_are_found() -> None:
    model = make_model(recipe())
    batch = twice(make_batch(model, SIZES, token_capacity=400, sentence_capacity=40))
    offsets = batch.packed.cu_seqlens.tolist()
    expected = []
    sentence = 0
    for name, n in SIZES.items():
        for copy_ in [0.0, 1.0] * model.tasks[name].arity:
            for _ in range(n):
                expected += [copy_] * (offsets[sentence + 1] - offsets[sentence])
                sentence += 1
    assert second_copies(batch)[:, 0].tolist() == expected


def test_second_copies_leave_out_padding_and_tasks_without_twins() -> None:
    model = make_model(recipe())
    batch = make_batch(model, SIZES, token_capacity=400, sentence_capacity=40)
    assert second_copies(batch).sum() == 0
    some = copy.copy(batch)
    object.__setattr__(some, "duplicated", frozenset({"sentiment"}))  # five examples: the last three would be copies
    offsets = batch.packed.cu_seqlens.tolist()
    assert second_copies(some)[:, 0].nonzero().flatten().tolist() == list(range(offsets[2], offsets[5]))


@pytest.mark.parametrize("values", [WIDE, WIDE | {"radius": 0.01}], ids=["within", "projected"])
def test_the_perturbation_is_one_step_of_projected_ascent(values: dict[str, float]) -> None:
    chosen = recipe(regularisation=values)
    step = step_of(chosen)
    batch, *_ = unlike_twins(step.model, SIZES)
    second = second_copies(batch)
    found = noise_of(step, batch)
    torch.manual_seed(5)
    bound = values["radius"]
    start = (torch.randn(found.shape) * values["noise"]).clamp(-bound, bound).double() * second
    start.requires_grad_()
    (gradient,) = torch.autograd.grad(apart(copy.deepcopy(step.model).double(), batch, start), start)
    direction = gradient / gradient.abs().amax(1, keepdim=True)
    expected = (start + values["step"] * direction).clamp(-bound, bound) * second
    torch.testing.assert_close(found.double(), expected.detach(), atol=2e-4, rtol=1e-3)
    assert found[second[:, 0] == 0].abs().max() == 0
    assert found.abs().max() <= bound


def test_the_ascent_ascends() -> None:
    chosen = recipe(regularisation=WIDE)
    step = step_of(chosen)
    batch = twice(make_batch(step.model, SIZES))
    random = torch.randn(batch.packed.num_tokens, CONFIG.hidden_size).clamp(-1, 1) * 0.1 * second_copies(batch)
    assert apart(step.model, batch, noise_of(step, batch)) > 3 * apart(step.model, batch, random)


def test_the_ascent_leaves_gradients_and_weights_alone() -> None:
    chosen = recipe(regularisation=WIDE, surgery={"method": "pcgrad"})
    step = step_of(chosen)
    batch = twice(make_batch(step.model, SIZES))
    step.gradients.J.fill_(7.0)
    step.head_gradient.fill_(7.0)
    before = step.flat.data.clone()
    noise_of(step, batch)
    assert (step.gradients.J == 7).all()
    assert (step.head_gradient == 7).all()
    assert torch.equal(step.flat.data, before)


# ---- The step ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surgery", ["none", "pcgrad"])
def test_a_smart_step_has_the_gradients_of_loss_and_divergence(surgery: str) -> None:
    """J and the heads' gradients against ordinary autograd through the same perturbation."""
    chosen = recipe(regularisation=WIDE, surgery={"method": surgery})
    step = step_of(chosen)
    batch = twice(make_batch(step.model, SIZES))
    model = copy.deepcopy(step.model)
    step.prepare(batch, 1.0)
    expected_noise = noise_of(step, batch)
    assert consistency_of(step).adversary is not None
    fixed = Adversary(step.model, step.flat, consistency_of(step).adversary.options)
    object.__setattr__(fixed, "noise", lambda *_: expected_noise)
    consistency_of(step).adversary = fixed
    result = step.compute(batch)

    plain = twice(make_batch(model, SIZES))
    hidden = model.encoder.encode_packed(Perturbed(expected_noise), plain.packed)
    losses = model.losses(plain, hidden, consistency=ConsistencyLoss(2.0, both=False))
    torch.testing.assert_close(result.losses, torch.stack(list(losses.values())).detach(), atol=1e-5, rtol=1e-4)
    weight = model.encoder.bert_layers[0].interm_dense.weight
    own = dict(step.model.named_parameters())["encoder.bert_layers.0.interm_dense.weight"]
    rows = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses.values()]
    if surgery == "none":
        rows = [torch.stack(rows).sum(0)]
    for row, found in zip(rows, step.gradients.view(own), strict=True):
        torch.testing.assert_close(found, row, atol=1e-5, rtol=1e-3)
    for task in SIZES:
        for p, q in zip(step.heads[task], model.head_parameters([task]), strict=True):
            (gradient,) = torch.autograd.grad(losses[task], q, retain_graph=True)
            torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-3)


def test_smoothness_is_learned() -> None:
    """Answers to perturbed embeddings move less after training with it than without."""

    def trained(values: dict[str, float]) -> float:
        chosen = recipe(regularisation=values)
        step = step_of(chosen)
        for index in range(30):
            step(twice(make_batch(step.model, SIZES, seed=index % 3)), 1.0)
        judge = step_of(recipe(regularisation=WIDE))
        judge.flat.data.copy_(step.flat.data)
        batch = twice(make_batch(judge.model, SIZES, seed=9))
        return apart(judge.model, batch, noise_of(judge, batch)).item()

    assert trained(WIDE | {"smart": 20.0}) < 0.7 * trained({})


# ---- The teacher ---------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_moving_average_of_the_weights() -> None:
    chosen = recipe(regularisation={"proximal": 1.0, "momentum": 0.8})
    step = step_of(chosen)
    assert consistency_of(step).teacher is not None
    expected = step.flat.data.double().clone()
    for index in range(5):
        batch = make_batch(step.model, SIZES, seed=index)
        if index == 2:
            batch.labels["similarity"][0] = float("nan")
        step(batch, 1.0)
        if index != 2:
            expected = 0.8 * expected + 0.2 * step.flat.data.double()
    for entry in step.flat.trainable:
        its = dict(consistency_of(step).teacher.model.named_parameters())[entry.name]
        torch.testing.assert_close(its.double(), step.flat.view(expected, entry.parameter), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("twins", [False, True])
def test_the_proximal_loss_is_the_divergence_from_the_teachers_answers(twins: bool) -> None:
    """Times the task's weight, and this process's part of the step's examples."""
    values: dict[str, Any] = {"proximal": 3.0, "momentum": 0.5} | ({"r_drop": 0.5} if twins else {})
    tasks = PLAIN | {"sentiment": {"dropout": 0.0, "weight": 0.5}}
    chosen = recipe(regularisation=values, tasks=tasks)
    step = step_of(chosen)
    plain_model = copy.deepcopy(step.model)
    plain = OnePassStep(plain_model, recipe(regularisation=values | {"proximal": 0.0}, tasks=tasks), torch.float32)
    assert consistency_of(step).teacher is not None
    for index in range(3):
        batch = unlike_twins(step.model, SIZES, seed=index)[0] if twins else make_batch(step.model, SIZES, seed=index)
        examples = {name: batch.num_examples(name) * (4 if name == "paraphrase" else 1) for name in SIZES}
        batch = replace(batch, totals=StepTotals(examples, batch.packed.num_tokens))
        plain.flat.data.copy_(step.flat.data)
        teacher = consistency_of(step).teacher.model
        hidden = [m.encoder(batch.packed)["last_hidden_state"] for m in (step.model, teacher)]
        answers = [m.outputs(batch, h) for m, h in zip((step.model, teacher), hidden, strict=True)]
        if twins:
            answers = [{name: split_copies(each)[0] for name, each in answer.items()} for answer in answers]
        pulls = [divergence(step.model.head(n), answers[0][n], answers[1][n]) for n in SIZES]
        expected = plain.compute(batch).losses + 3.0 * torch.tensor([0.5, 0.25, 1.0]) * torch.stack(pulls)
        torch.testing.assert_close(step(batch, 1.0).losses, expected.detach(), atol=1e-5, rtol=1e-4)
        assert (torch.stack(pulls) > 0).all() == (index > 0)
        assert not any(module.training for module in teacher.modules())  # it answers without dropout


def test_the_teacher_holds_back() -> None:
    def moved(values: dict[str, float]) -> float:
        chosen = recipe(regularisation=values)
        step = step_of(chosen)
        before = step.flat.data.clone()
        batch = make_batch(step.model, SIZES)
        start = step.model.outputs(batch, step.model.encoder(batch.packed)["last_hidden_state"])
        for _ in range(20):
            step(batch, 1.0)
        end = step.model.outputs(batch, step.model.encoder(batch.packed)["last_hidden_state"])
        assert not torch.equal(step.flat.data, before)
        return sum(divergence(step.model.head(name), start[name], end[name]).item() for name in SIZES)

    assert moved({"proximal": 30.0, "momentum": 0.999}) < 0.5 * moved({})


# ---- Both ----------------------------------------------------------------------------------------------------------------

BOTH: dict[str, Any] = {"regularisation": WIDE | {"proximal": 1.0, "momentum": 0.7}}


def test_a_restored_smart_step_goes_on_bit_for_bit() -> None:
    dropped = BertConfig(**(vars(CONFIG) | {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}))
    chosen = recipe(tasks={"sentiment": {}, "paraphrase": {}, "similarity": {}}, surgery={"method": "pcgrad"}, **BOTH)

    def fresh() -> OnePassStep:
        torch.manual_seed(0)
        model = MultitaskModel(BertModel(dropped), build_tasks(chosen), "mean")
        return OnePassStep(model, chosen, torch.float32)

    def run(split: bool) -> Tensor:
        step = fresh()
        for index in range(4):
            if split and index == 2:
                saved, weights = copy.deepcopy(step.state_dict()), step.flat.data.clone()
                step = fresh()
                step.flat.data.copy_(weights)
                step.load_state_dict(saved)
                torch.manual_seed(99)
            step(twice(make_batch(step.model, SIZES, seed=index)), 1.0)
        return step.flat.data

    assert torch.equal(run(True), run(False))


def test_an_empty_task_and_padding_do_no_harm() -> None:
    chosen = recipe(surgery={"method": "pcgrad"}, **BOTH)
    step = step_of(chosen)
    result = step(twice(make_batch(step.model, SIZES | {"paraphrase": 0})), 1.0)
    assert result.losses.isfinite().all()
    assert not result.nonfinite.any()
    assert (step.gradients.J[1] == 0).all()


def test_bf16_sees_the_perturbation() -> None:
    """The default radius, without dropout: the answers of twins differ."""
    chosen = recipe(regularisation={"smart": 1e4}, optimizer={"lr": 0.0})
    losses = []
    for weight in (0.0, 1e4):
        each = recipe(regularisation={"smart": weight}, optimizer={"lr": 0.0})
        step = OnePassStep(make_model(chosen), each, torch.bfloat16)
        losses.append(step(twice(make_batch(step.model, SIZES)), 1.0).losses)
    assert (losses[1] > losses[0]).all()


def test_smart_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(surgery={"method": "pcgrad"}, **BOTH)
    model = make_model(chosen)
    assert strangers(model, chosen, twice(make_batch(model, SIZES)), monkeypatch) == []


ALL_EXTRAS = pytest.mark.parametrize(
    "asked", [{"r_drop": 1.0, "proximal": 1.0}, WIDE | {"proximal": 1.0}], ids=["r_drop", "smart"]
)


@pytest.mark.gpu
@ALL_EXTRAS
def test_graphs_train_with_all_extras_as_the_eager_step_does(asked: dict[str, float]) -> None:
    check_graphs(torch.device("cuda"), asked)


@ALL_EXTRAS
@pytest.mark.usefixtures("graphs_on_cpu")
def test_recorded_graphs_train_with_all_extras_as_the_eager_step_does(asked: dict[str, float]) -> None:
    check_graphs(torch.device("cpu"), asked)


def check_graphs(device: torch.device, asked: dict[str, float]) -> None:
    chosen = recipe(
        surgery={"method": "pcgrad"},
        training={"ema": 0.9},
        weighting={"method": "dwa", "window": 2},
        regularisation=asked,
    )
    model = make_model(chosen).to(device)
    eager = OnePassStep(copy.deepcopy(model), chosen, torch.float32)
    graphed = GraphedStep(OnePassStep(model, chosen, torch.float32))
    batch = twice(make_batch(model, SIZES)).to(device)
    for _ in range(8):
        one, two = eager(batch, 1.0), graphed(batch, 1.0)
        torch.testing.assert_close(one.losses, two.losses, rtol=1e-3, atol=1e-5)
    assert len(graphed) == 1
    torch.testing.assert_close(eager.flat.data, graphed.step.flat.data, rtol=1e-3, atol=1e-4)
    assert eager.average is not None
    assert graphed.average is not None
    averages = [step.average.state_dict() for step in (eager, graphed)]
    for name, tensor in averages[0].items():
        torch.testing.assert_close(averages[1][name], tensor, rtol=1e-3, atol=1e-4)


# ---- Recipes -------------------------------------------------------------------------------------------------------------


def test_the_wished_for_recipe_is_smart() -> None:
    asked = Recipe.load("wish-smart").regularisation
    assert (asked.smart, asked.proximal, asked.duplicates_examples) == (1.0, 1.0, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smart": 1.0, "r_drop": 1.0}, "r_drop and smart: set only one"),
        ({"smart": -1.0}, "smart = -1.0: expected 0 or more"),
        ({"smart": 1.0, "noise": 0.0}, "noise = 0.0: smart needs a perturbation to start from"),
        ({"momentum": 1.0}, "momentum = 1.0: expected 0 <= momentum < 1"),
    ],
)
def test_mistakes_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe().with_values({"regularisation": values}, "test")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "reference"], "the reference backend has no such step"),
        (["--set", "model.freeze=true"], "has nothing to smooth"),
    ],
)
def test_what_cannot_be_smart_is_refused_before_the_first_step(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run(small_data(tmp_path / "data"), tmp_path / "run", "--recipe", "wish-smart", *flags)
    assert cli.run(train.main, run) == 2
    assert message in error_line(capsys)
