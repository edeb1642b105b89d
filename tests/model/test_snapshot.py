# SPDX-License-Identifier: Apache-2.0
"""A snapshot's weights are those of its moment, and the modes of the model return."""

from __future__ import annotations

import torch

from minbert_fast import BertModel
from minbert_fast.data import sample_directory
from minbert_fast.model.packing import pack
from minbert_fast.model.rows import PackedRows
from minbert_fast.model.snapshot import Snapshot, _evaluating


def sample_model() -> BertModel:
    return BertModel.from_pretrained(sample_directory().model)


def test_modes_return_when_the_last_thread_has_finished():
    """The first thread to finish once put the others back into training mode, where they drew dropout masks."""
    model = sample_model().train()
    with _evaluating(model):
        other = _evaluating(model)
        other.__enter__()
    assert not any(module.training for module in model.modules())
    other.__exit__(None, None, None)
    assert all(module.training for module in model.modules())


def test_a_snapshot_in_bf16_is_of_its_moment():
    model = sample_model()
    rows = PackedRows.of(pack([[[2, 17, 9, 3]]]))
    snapshot = Snapshot(model, torch.bfloat16)
    before = snapshot.hidden(rows)
    with torch.no_grad():
        model.bert_layers[0].interm_dense.weight.add_(1.0)
    assert torch.equal(snapshot.hidden(rows), before)
    assert not torch.equal(Snapshot(model, torch.bfloat16).hidden(rows), before)
