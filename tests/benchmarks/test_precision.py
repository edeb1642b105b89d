# SPDX-License-Identifier: Apache-2.0
"""Training with bf16 products matches fp32 over 300 steps of a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import precision
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_three_hundred_steps_in_bf16_stay_within_the_noise_of_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sample = sample_directory()
    found = precision.compare(sample.data, sample.model, 300, 6, 30, Recipe.load("demonstration"))
    for task, curve in found.curves["fp32"].items():
        assert found.bf16_distance[task] <= found.seed_distance[task] + 0.01, task
        assert min(curve[-3:]) < curve[0], f"{task} does not learn, so the comparison is void"
    assert found.curves["bf16"] != found.curves["fp32"]
