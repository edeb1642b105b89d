# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs on a CPU."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch

from tests.without_gpu.recorded_graph import RecordedGraph


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures are recorded (`RecordedGraph`), streams do nothing."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.captured())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    for name in ("Stream", "current_stream", "graph_pool_handle", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", mock.Mock(), raising=False)
