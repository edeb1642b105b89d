# SPDX-License-Identifier: Apache-2.0
"""How tests see which way a layer went."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from minbert_fast.model import passes


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All models here are tiny."""


@pytest.fixture
def fused_layers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by the parts of each layer that the fused path computes."""
    layers: list[Any] = []
    original = passes.fused_layer

    def counted(layer: Any, *arguments: Any) -> Tensor:
        layers.append(layer)
        return original(layer, *arguments)

    monkeypatch.setattr(passes, "fused_layer", counted)
    return layers
