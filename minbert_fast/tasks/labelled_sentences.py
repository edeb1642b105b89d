# SPDX-License-Identifier: Apache-2.0
"""Embeds the labelled training sentences that heads compare with, before their stage begins."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from minbert_fast.common.device import DTYPES, Precision
from minbert_fast.common.schema import ConfigError
from minbert_fast.data.collate import Collator
from minbert_fast.data.tokens import TokenTable
from minbert_fast.model.inference import Snapshot
from minbert_fast.model.passes import PackedRows
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks.model import MultitaskModel

CHUNK = 256  # sentences per batch


def check_encoder_frozen(model: MultitaskModel, recipe: Recipe) -> None:
    """Raises ConfigError if a stage with labelled sentences trains the encoder: their embeddings would become stale."""
    for name in recipe.tasks:
        if model.head(name).labelled_sentences() is not None and not recipe.model.freeze:
            raise ConfigError(f"tasks.{name}.neighbours: the stage that trains it needs model.freeze = true")


@torch.no_grad()
def embed_labelled_sentences(
    model: MultitaskModel, recipe: Recipe, tables: Mapping[str, TokenTable], precision: Precision
) -> None:
    """Chooses and embeds the labelled sentences of a stage's heads with the current encoder.

    A pure function of weights, data and seed, so that a resumed run stores the same ones. Raises ConfigError.
    """
    for name, table in tables.items():
        stored = model.head(name).labelled_sentences()
        if stored is None:
            continue
        assert table.labels is not None
        try:
            rows = stored.choose(table.labels, recipe.training.seed)
        except ValueError as error:
            raise ConfigError(f"tasks.{name}.neighbours: {table.path}: {error}") from None
        collate, snapshot = Collator({name: table}, recipe.data.max_length), Snapshot(model.encoder, DTYPES[precision])
        vectors: list[torch.Tensor] = []
        for begin in range(0, len(rows), CHUNK):
            batch = collate({name: rows[begin : begin + CHUNK]}).to(stored.vectors.device)
            vectors += model.inputs(batch, snapshot.hidden(PackedRows.of(batch.packed)))[name].embeddings
        stored.store(torch.cat(vectors), torch.from_numpy(table.labels[rows]))
