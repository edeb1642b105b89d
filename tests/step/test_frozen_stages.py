# SPDX-License-Identifier: Apache-2.0
"""Parameters frozen in one stage train in the next, equally on both backends; frozen parameters collect no gradients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minbert_fast import train
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.step.backends import Backend, make_step
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.tasks import MultitaskModel
from tests.small import small_data, small_run
from tests.step.test_step import SIZES, make_batch, make_model, recipe

BACKENDS: tuple[Backend, ...] = ("fast", "reference")
POOLINGS = ("mean", "cls", "max", "pooler")
PAIR_LAYERS = {"shared_layers": "pairs", "dropout": 0.0}
TIED = {"sentiment": {"dropout": 0.0}, "paraphrase": PAIR_LAYERS, "similarity": {"head": "linear", **PAIR_LAYERS}}


def stages(pooling: str, surgery: str = "pcgrad", **values: Any) -> tuple[Recipe, Recipe]:
    """A stage that trains the heads alone, then one that trains everything."""
    frozen, whole = (
        recipe(model={"pooling": pooling, "freeze": freeze}, surgery={"method": surgery}, **values)
        for freeze in (True, False)
    )
    return frozen, whole


def train_stage(model: MultitaskModel, chosen: Recipe, backend: Backend, steps: range) -> Any:
    step = make_step(backend, model, chosen, torch.float32)
    for index in steps:
        step(make_batch(model, SIZES, seed=index), 1.0)
    return step


def moved(model: MultitaskModel, start: dict[str, Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}


def values_of(model: MultitaskModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("pooling", "tasks"),
    [*((pooling, None) for pooling in POOLINGS), ("mean", TIED), ("pooler", TIED)],
    ids=[*POOLINGS, "mean, tied heads", "pooler, tied heads"],
)
def test_freezing_then_training_is_equal_on_both_backends(pooling: str, tasks: dict[str, Any] | None) -> None:
    frozen, whole = stages(pooling, **({"tasks": tasks} if tasks else {}))
    models = {"fast": make_model(frozen)}
    models["reference"] = copy.deepcopy(models["fast"])
    for backend in BACKENDS:
        model = models[backend]
        start = values_of(model)
        train_stage(model, frozen, backend, range(3))
        assert moved(model, start)
        assert all(name.startswith("heads.") for name in moved(model, start))
        assert all(p.requires_grad for p in model.parameters())
        assert all(p.grad is None for p in model.encoder.parameters())
        between = values_of(model)
        train_stage(model, whole, backend, range(3, 6))
        still = {name for name in between if name not in moved(model, between)}
        unused = set() if pooling == "pooler" else {"encoder.pooler_dense.weight", "encoder.pooler_dense.bias"}
        assert still == unused, backend
    slow = dict(models["reference"].named_parameters())
    for name, p in models["fast"].named_parameters():
        torch.testing.assert_close(p, slow[name], atol=3e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("pooling", "surgery"), [*((pooling, "pcgrad") for pooling in POOLINGS), ("pooler", "none")])
def test_a_stage_after_a_frozen_one_begins_with_its_own_gradients(pooling: str, surgery: str) -> None:
    """The frozen pooler collected gradients, which the next stage added to its first; a model may come with gradients."""
    frozen, whole = stages(pooling, surgery)
    model = make_model(frozen)
    train_stage(model, frozen, "fast", range(2))
    fresh = copy.deepcopy(model)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), None
    batch = make_batch(model, SIZES, seed=5)
    after, alone = (OnePassStep(each, whole, torch.float32) for each in (model, fresh))
    results = after(batch, 1.0), alone(batch, 1.0)
    assert torch.equal(after.gradients.J, alone.gradients.J)
    assert torch.equal(after.head_gradient, alone.head_gradient)
    assert torch.equal(results[0].grad_norm, results[1].grad_norm)
    assert torch.equal(after.flat.data, alone.flat.data)


def test_the_buffer_of_an_earlier_stage_is_freed() -> None:
    """The head of a task that the next stage lacks was a view of that buffer, which is as large as the model."""
    whole = recipe()
    model = make_model(whole)
    train_stage(model, whole, "fast", range(1))
    OnePassStep(model, recipe(tasks={"similarity": {}}), torch.float32)
    for name, p in model.heads.named_parameters():
        assert p.untyped_storage().nbytes() == p.nbytes, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_user_froze_stays_frozen_in_every_stage(backend: Backend) -> None:
    frozen, whole = stages("pooler", surgery="none")
    model = make_model(frozen)
    names = ("encoder.pooler_dense.weight", "encoder.bert_layers.0.interm_dense.weight", "encoder.pos_embedding.weight")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    start = values_of(model)
    for chosen, steps in ((frozen, range(3)), (whole, range(3, 6))):
        train_stage(model, chosen, backend, steps)
    assert {name for name in start if name not in moved(model, start)} == set(names)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(names)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 4])
def test_stages_resumed_in_the_middle_end_as_if_never_stopped(backend: Backend, cut: int) -> None:
    """The weights and the step's state, taken after `cut` of 3 frozen and 3 unfrozen steps, carry over to a new process."""
    plan = stages("pooler")

    def run(model: MultitaskModel, first: int, last: int, state: Any = None) -> Any:
        step = None
        for number, chosen in enumerate(plan):
            part = range(max(first, 3 * number), min(last, 3 * number + 3))
            if not part:
                continue
            step = make_step(backend, model, chosen, torch.float32)
            if state is not None:
                step.load_state_dict(state)
                state = None
            for index in part:
                step(make_batch(model, SIZES, seed=index), 1.0)
        return step

    whole = make_model(plan[0])
    run(whole, 0, 6)
    before = make_model(plan[0])
    state = copy.deepcopy(run(before, 0, cut).state_dict())
    after = make_model(plan[0])
    after.load_state_dict(before.state_dict())
    run(after, cut, 6, state)
    for (name, p), q in zip(whole.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.ci
def test_a_run_of_two_stages_resumed_in_each_ends_as_if_never_stopped(tmp_path: Path) -> None:
    recipe_file = tmp_path / "two.toml"
    recipe_file.write_text(
        'extends = "demonstration"\nname = "two"\n[model]\npooling = "pooler"\n'
        "[[stages]]\nmodel = { freeze = true }\n[stages.training]\nmax_steps = 3\n"
        "[[stages]]\n[stages.training]\nmax_steps = 3\n",
        encoding="utf-8",
    )
    flags = ["--recipe", str(recipe_file), "--lr", "1e-3", "--set", "checkpoint.every=1"]
    data, whole, parts = small_data(tmp_path / "data"), tmp_path / "whole", tmp_path / "parts"
    train.main(small_run(data, whole, *flags))
    train.main(small_run(data, parts, *flags, "--stop-after", "2"))
    train.main(small_run(data, parts, *flags, "--stop-after", "4", "--resume"))
    train.main(small_run(data, parts, *flags, "--resume"))
    for name in ("model", "heads"):
        expected, found = (load_file(folder / "last" / f"{name}.safetensors") for folder in (whole, parts))
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), key
    assert json.loads((parts / "summary.json").read_text())["steps"] == 6
