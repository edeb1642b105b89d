# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs that cannot be run, and what is done around one. tests/commands/test_export.py runs real graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minbert_fast.common.schema import ConfigError
from minbert_fast.data import Tokenizer, sample_directory
from minbert_fast.tasks.exporting import onnx_model
from minbert_fast.tasks.exporting.onnx_model import GRAPH, Contents, OnnxModel


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


def test_cut_vectors_are_scaled_again_if_asked_for() -> None:
    """As `Predictor` does: a graph that scales its vectors and then cuts them gave lengths below 1."""
    session = SimpleNamespace(run=lambda outputs, feed: [np.full((len(feed["input_ids"]), 2), 0.5, np.float32)])
    contents = Contents(2, 9, "mean", normalize=True)
    model = OnnxModel(session, Tokenizer.from_pretrained(sample_directory().model), contents)
    np.testing.assert_array_equal(model.encode(["a film", "no"]), np.full((2, 2), 0.5))
    lengths = np.linalg.norm(model.encode(["a film", "no"], normalize=True), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
