# SPDX-License-Identifier: Apache-2.0
"""The drop-in benchmark: both candidates take the same step."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import dropin, harness
from minbert_fast import BertConfig, BertModel

CONFIG = BertConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def test_both_take_the_same_first_step() -> None:
    torch.manual_seed(0)
    model = BertModel(CONFIG).train()
    ids, mask = dropin.rectangle(6, CONFIG.vocab_size, torch.device("cpu"))
    one, other = (make(copy.deepcopy(model), ids, mask)() for make in (dropin.swapped, dropin.stock))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_rows_compare_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropin, "CONFIGS", {"tiny": CONFIG})
    monkeypatch.setattr(dropin, "SMALLEST", CONFIG)
    monkeypatch.setattr(dropin, "SENTENCES", (3,))
    rows = list(dropin.run(torch.device("cpu"), harness.Ceilings(1e9, 1e9, 1e9)))
    both = ["swapped imports", "stock modules"]
    assert [row.name for row in rows] == [*both, "transformers", *both]
    assert rows[0].speedup.keys() == {"stock modules", "transformers"}
    assert rows[3].speedup.keys() == {"stock modules"}
