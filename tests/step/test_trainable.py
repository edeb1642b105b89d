# SPDX-License-Identifier: Apache-2.0
"""Which parameters a stage trains, in which part of the buffers, with which learning rate and decay; written out here.

Both steps take the settings from `trainable`, so their agreement says nothing about them.
"""

from __future__ import annotations

from typing import Any

import pytest

from minbert_fast.step.trainable import trainable
from tests.step.test_frozen_stages import TIED
from tests.step.test_step import make_model, recipe

TASKS: dict[str, Any] = TIED | {"sentiment": {"dropout": 0.0, "pooling": "pooler"}}


def settings_of(**sections: Any) -> dict[str, tuple[str, float, float]]:
    """Label, learning rate and decay of each trained parameter, by name."""
    chosen = recipe(**({"tasks": TASKS} | sections))
    parts = trainable(make_model(chosen), chosen)
    lr = chosen.optimizer.lr
    return {e.name: (label, lr * e.lr_factor, e.weight_decay) for label, e in parts.trained()}


@pytest.mark.parametrize("decay_all", [False, True])
def test_rates_fall_towards_the_embeddings_and_only_matrices_decay(decay_all: bool) -> None:
    optimizer = {"lr": 1e-3, "head_lr": 4e-3, "layer_decay": 0.5, "weight_decay": 0.1, "decay_all": decay_all}
    found = settings_of(optimizer=optimizer)
    vectors = 0.1 if decay_all else 0.0
    expected = {
        "encoder.word_embedding.weight": ("words", 0.25e-3, 0.1),
        "encoder.pos_embedding.weight": ("shared", 0.25e-3, 0.1),
        "encoder.embed_layer_norm.weight": ("shared", 0.25e-3, vectors),
        "encoder.bert_layers.0.out_dense.weight": ("shared", 0.5e-3, 0.1),
        "encoder.bert_layers.0.out_dense.bias": ("shared", 0.5e-3, vectors),
        "encoder.bert_layers.1.self_attention.query.weight": ("shared", 1e-3, 0.1),
        "encoder.bert_layers.1.out_layer_norm.bias": ("shared", 1e-3, vectors),
        "encoder.pooler_dense.weight": ("shared", 1e-3, 0.1),
        "encoder.pooler_dense.bias": ("shared", 1e-3, vectors),
    }
    for name, settings in expected.items():
        assert found[name] == (settings[0], pytest.approx(settings[1]), settings[2]), name
    heads = {name: settings for name, settings in found.items() if name.startswith("heads.")}
    assert [rate for _, rate, _ in heads.values()] == pytest.approx([4e-3] * len(heads))
    tied = {name for name, (label, _, _) in heads.items() if label == "shared"}
    assert tied == {f"heads.paraphrase.stack.layers.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    assert all(name.split(".")[1] == label for name, (label, _, _) in heads.items() if name not in tied)


def test_every_trained_parameter_has_one_place() -> None:
    """The pooler trains where a task pools with it; a frozen encoder leaves the heads and their common layers."""
    names = {name for name, _ in make_model(recipe(tasks=TASKS)).named_parameters()}
    assert set(settings_of()) == names
    pooler = {"encoder.pooler_dense.weight", "encoder.pooler_dense.bias"}
    assert set(settings_of(tasks=TIED)) == names - pooler
    assert set(settings_of(model={"freeze": True})) == {name for name in names if name.startswith("heads.")}


def test_what_the_user_froze_has_no_place() -> None:
    chosen = recipe(tasks=TASKS)
    model = make_model(chosen)
    frozen = {"heads.sentiment.output.weight", "encoder.bert_layers.0.out_dense.bias"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    trained = {spec.name for _, spec in trainable(model, chosen).trained()}
    assert trained == {name for name, _ in model.named_parameters()} - frozen
