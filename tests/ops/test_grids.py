# SPDX-License-Identifier: Apache-2.0
"""Grids of the launches at sizes that no interpreter reaches: CUDA takes 65,535 programs along the second and third axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minbert_fast.ops.backend import triton_available

if not triton_available():
    pytest.skip("Triton is not installed", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from minbert_fast.kernels.adamw import adamw
from minbert_fast.kernels.add_norm import add_norm_backward, add_norm_forward
from minbert_fast.kernels.attention import attention_backward, attention_forward
from minbert_fast.kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from minbert_fast.kernels.embedding import embedding_backward, embedding_forward
from minbert_fast.kernels.gram import gram
from minbert_fast.kernels.launches import intercepted, meta
from minbert_fast.kernels.linear import linear_gradients
from minbert_fast.kernels.pooling import pooling_backward, pooling_forward

ROWS, TASKS, HIDDEN, WIDE, WORDS = 1 << 21, 64, 768, 3072, 250_000
X, INNER, QKV = (meta(ROWS, *shape, dtype=torch.bfloat16) for shape in ((HIDDEN,), (WIDE,), (3, 12, 64)))
INDEX, OFFSETS, BOUNDS = (meta(size, dtype=torch.int32) for size in (ROWS, ROWS + 1, TASKS + 1))
TABLES = [meta(size, HIDDEN, dtype=torch.bfloat16) for size in (WORDS, 512, 2)]
LOOKUP = (INDEX, INDEX, INDEX, *TABLES)
GRADIENTS = [meta(TASKS, size, HIDDEN) for size in (WORDS, 512, 2)]
VECTOR, BIAS, ROWWISE, LSE, BY_TASK = meta(HIDDEN), meta(WIDE), meta(ROWS), meta(12, ROWS), meta(TASKS, HIDDEN)
POOLED, CHOSEN = meta(ROWS, HIDDEN), meta(ROWS, HIDDEN, dtype=torch.int32)
DROP = (0.1, meta(1, dtype=torch.int64), 1)
SENTENCES = (OFFSETS, None, 512, 0.125, *DROP)
J, FLAT, TABLE, SCALARS = meta(TASKS, 340_000_000), meta(340_000_000), meta(WORDS, 4096), meta(4)
SETTINGS = (1.0, 0.9, 0.999, 1e-6, 0.01, True)

CALLS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "adamw": (adamw, (J, meta(TASKS), FLAT, FLAT, FLAT, SCALARS, None, None, *SETTINGS)),
    "adamw by rows": (
        adamw, (meta(TASKS, 9, 4096), meta(TASKS), TABLE, TABLE, TABLE, SCALARS, None, INDEX[:WORDS], *SETTINGS),
    ),
    "add_norm": (add_norm_forward, (X, VECTOR, X, VECTOR, VECTOR, 1e-12, *DROP, X, ROWWISE, ROWWISE)),
    "add_norm, backward": (
        add_norm_backward, (X, X, VECTOR, X, VECTOR, ROWWISE, ROWWISE, BOUNDS, *DROP, *[BY_TASK] * 3, X, X),
    ),
    "attention": (attention_forward, (QKV, *SENTENCES, X, LSE)),
    "attention, backward": (attention_backward, (X, QKV, X, LSE, *SENTENCES, QKV)),
    "bias_gelu": (bias_gelu_forward, (INNER, BIAS, INNER)),
    "bias_gelu, backward": (bias_gelu_backward, (INNER, INNER, BIAS, BOUNDS, meta(TASKS, WIDE), INNER)),
    "embedding": (embedding_forward, (*LOOKUP, VECTOR, VECTOR, 1e-12, *DROP, X, ROWWISE, ROWWISE)),
    "embedding, backward": (
        embedding_backward,
        (X, *LOOKUP, VECTOR, ROWWISE, ROWWISE, BOUNDS, OFFSETS, INDEX, OFFSETS, *DROP, *GRADIENTS, BY_TASK, BY_TASK, 0),
    ),
    "gram": (gram, (J, meta(TASKS, TASKS), True)),
    "linear": (linear_gradients, (X, X, BOUNDS, meta(TASKS, HIDDEN, HIDDEN), BY_TASK)),
    "pooling": (pooling_forward, (X, OFFSETS, "max", POOLED, CHOSEN)),
    "pooling, backward": (pooling_backward, (POOLED, OFFSETS, CHOSEN, "max", ROWS, torch.bfloat16, X)),
}  # fmt: skip


@pytest.mark.parametrize(("launcher", "arguments"), CALLS.values(), ids=CALLS)
def test_two_million_rows_or_a_large_model_fit_the_grid(
    launcher: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    grids: list[tuple[int, ...]] = []

    def take(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grids.append(grid)

    with intercepted(GPUTarget("cuda", 90, 32), take):
        launcher(*arguments)
    assert grids
    for first, *others in grids:
        assert first < 2**31
        assert all(size <= 65_535 for size in others), grids
