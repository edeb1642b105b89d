# SPDX-License-Identifier: Apache-2.0
"""Tensors on their way to a device: the host never waits for what a GPU has queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minbert_fast.common.device import sent


@pytest.mark.parametrize(("source", "target", "pinned"), [("cpu", "cuda", True), ("cuda", "cuda", False)])
def test_a_copy_to_a_gpu_leaves_from_page_locked_memory(source: str, target: str, pinned: bool) -> None:
    """From other memory PyTorch's copy is queued behind the GPU's work, and the host may wait for both."""
    seen: list[Any] = []
    tensor: Any = SimpleNamespace(device=torch.device(source), to=lambda *to, **how: seen.append((to, how)))
    tensor.pin_memory = lambda: seen.append("pinned") or tensor
    sent(tensor, torch.device(target))
    assert seen == ["pinned"] * pinned + [((torch.device(target),), {"non_blocking": True})]


def test_elsewhere_nothing_is_pinned() -> None:
    tensor = torch.arange(3)
    assert sent(tensor, torch.device("cpu")) is tensor
    assert sent(tensor, torch.device("meta")).shape == (3,)


@pytest.mark.gpu
def test_what_is_sent_arrives() -> None:
    device = torch.device("cuda", 0)
    numbers = [torch.arange(i, i + 1000) for i in range(100)]
    aside = [each.pin_memory() for each in numbers]  # to allocate page-locked memory may wait
    del aside
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    found = [sent(each.clone(), device) for each in numbers]
    assert not torch.cuda.current_stream().query(), "the host has waited"
    for each, expected in zip(found, numbers, strict=True):
        assert torch.equal(each.cpu(), expected)
