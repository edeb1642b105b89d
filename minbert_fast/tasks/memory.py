# SPDX-License-Identifier: Apache-2.0
"""Fills the heads' memories of labelled sentences, before the stage that uses them begins."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minbert_fast.common.device import DTYPES, Precision
from minbert_fast.common.schema import ConfigError
from minbert_fast.data import Collator, TokenTable
from minbert_fast.model.inference import Snapshot
from minbert_fast.model.passes import PackedRows
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks import MultitaskModel

CHUNK = 256  # sentences embedded together


def check_memories(model: MultitaskModel, recipe: Recipe) -> None:
    """Raises ConfigError where a stage would train the encoder away from the sentences that a head remembers."""
    for name in recipe.tasks:
        if model.head(name).memory() is not None and not recipe.model.freeze:
            raise ConfigError(f"tasks.{name}.neighbours: the stage that trains it needs model.freeze = true")


@torch.no_grad()
def fill_memories(
    model: MultitaskModel, recipe: Recipe, tables: Mapping[str, TokenTable], precision: Precision
) -> None:
    """Embeds the remembered sentences of each of the stage's heads with the encoder as it is.

    A pure function of weights, data and seed, so a resumed run remembers the same. Raises ConfigError.
    """
    for name, table in tables.items():
        memory = model.head(name).memory()
        if memory is None:
            continue
        assert table.labels is not None
        try:
            rows = memory.choose(table.labels, recipe.training.seed)
        except ValueError as error:
            raise ConfigError(f"tasks.{name}.neighbours: {table.path}: {error}") from None
        collate, snapshot = Collator({name: table}, recipe.data.max_length), Snapshot(model.encoder, DTYPES[precision])
        vectors: list[torch.Tensor] = []
        for begin in range(0, len(rows), CHUNK):
            batch = collate({name: rows[begin : begin + CHUNK]}).to(memory.vectors.device)
            vectors += model.inputs(batch, snapshot.hidden(PackedRows.of(batch.packed)))[name].embeddings
        memory.remember(torch.cat(vectors), torch.from_numpy(table.labels[rows]))
