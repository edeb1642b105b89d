# SPDX-License-Identifier: Apache-2.0
"""Steps that several ranks share, whose encoders have layers of different layouts: J, G and weights as in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minbert_fast import BertModel
from minbert_fast.data.batch import MultitaskBatch, StepTotals
from minbert_fast.model.packing import pack
from minbert_fast.parallel.sharding import ShardedGradients, connect
from minbert_fast.parallel.world import World
from minbert_fast.step.one_pass import OnePassStep
from minbert_fast.step.stepping import StepResult
from minbert_fast.tasks import MultitaskModel, build_tasks
from tests.parallel.threads import side_by_side
from tests.step.test_step import CONFIG, recipe

LAYERS = 4
CHOSEN = recipe(tasks={"sentiment": {"dropout": 0.0}}, surgery={"method": "pcgrad"})


def share_of_batch(seed: int, rank: int = 0, ranks: int = 1) -> MultitaskBatch:
    """Every `ranks`th of five sentences."""
    rng = np.random.default_rng(seed)
    sentences = [rng.integers(1, 61, rng.integers(1, 20)) for _ in range(5)]
    labels = torch.from_numpy(rng.integers(0, 5, 5))[rank::ranks].clone()
    packed = pack([sentences[rank::ranks]], words=np.unique(np.concatenate(sentences)))
    totals = StepTotals({"sentiment": 5}, sum(map(len, sentences)))
    names, rows = ("sentiment",), {"sentiment": np.arange(len(labels))}
    return MultitaskBatch(packed, names, {"sentiment": 1}, {"sentiment": labels}, rows, totals)


def check_shards(change: Callable[[list[nn.Module]], None], ranks: int, hidden_size: int = 32) -> None:
    """Three steps of `ranks` ranks with their shards of J equal those of one process, the moments in a checkpoint too.

    `change` gets the encoder's layers.
    """

    def make() -> MultitaskModel:
        torch.manual_seed(0)
        encoder = BertModel(replace(CONFIG, num_hidden_layers=LAYERS, hidden_size=hidden_size))
        change(list(encoder.bert_layers))
        return MultitaskModel(encoder, build_tasks(CHOSEN), "mean")

    def steps(model: MultitaskModel, world: World) -> tuple[list[StepResult], dict[str, Tensor]]:
        step = OnePassStep(model, CHOSEN, torch.float32, connect(world, shard=True))
        results = []
        for seed in range(3):
            results.append(step(share_of_batch(seed, world.rank, world.size), 1.0))
            for scratch in step.gradients.scratch[:-1] if isinstance(step.gradients, ShardedGradients) else ():
                scratch.fill_(9.0)  # as layers of other layouts may leave it
        return results, step.state_dict()["tensors"]

    def values(results: list[StepResult]) -> list[tuple[Tensor, Tensor | None]]:
        return [(result.grad_norm, result.gram) for result in results]

    alone, models = make(), [make() for _ in range(ranks)]
    expected, moments = steps(alone, World())
    for found, own in side_by_side(ranks, lambda world: steps(models[world.rank], world)):
        torch.testing.assert_close(values(found), values(expected), atol=1e-6, rtol=2e-6)
        torch.testing.assert_close(own, moments, atol=1e-6, rtol=1e-5)
    for (name, p), q in zip(models[-1].named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_gram_matrix_has_nothing_of_the_step_before(ranks: int) -> None:
    """The last layer's scratch memory kept what an earlier layer had written to it, between parameters of the last layer."""

    def freeze(layers: list[nn.Module]) -> None:
        for name, p in layers[-1].named_parameters():
            p.requires_grad_(not name.endswith("bias") and "query" not in name)

    check_shards(freeze, ranks)


def test_a_part_of_the_words_is_whole_rows() -> None:
    """Also where a row is no part of a cache line, nor a whole number of them."""
    check_shards(lambda layers: None, 3, hidden_size=48)


class Scaled(nn.Module):
    """A Linear with a number of its own."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) * self.scale
        return y


@pytest.mark.filterwarnings("ignore:.*this part runs as plain modules")
def test_a_foreign_module_may_have_a_single_number_for_a_parameter() -> None:
    """A sharded step ended with an IndexError."""

    def wrap(layers: list[nn.Module]) -> None:
        layers[1].interm_dense = Scaled(layers[1].get_submodule("interm_dense"))

    check_shards(wrap, 2)
