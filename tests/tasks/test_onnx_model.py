# SPDX-License-Identifier: Apache-2.0
"""Directories of ONNX graphs that cannot be run. tests/commands/test_export.py runs those that can."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minbert_fast.common.schema import ConfigError
from minbert_fast.tasks import onnx_model
from minbert_fast.tasks.onnx_model import GRAPH, OnnxModel


class SilentError(RuntimeError):
    """As onnxruntime's errors may be: without a message."""


def test_a_graph_that_onnxruntime_refuses_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise SilentError

    runtime = SimpleNamespace(
        SessionOptions=SimpleNamespace,
        InferenceSession=refuse,
        get_available_providers=lambda: ["CPUExecutionProvider"],
    )
    monkeypatch.setattr(onnx_model, "optional_library", lambda name: runtime)
    (tmp_path / GRAPH).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"onnxruntime cannot load it \(SilentError\)"):
        OnnxModel.from_pretrained(tmp_path, device="cpu")
