# SPDX-License-Identifier: Apache-2.0
"""Averaged weights, dynamic task weights, R-Drop and SMART where several processes train together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parallel.test_distributed import losses, same, succeed
from tests.small import read_records
from tests.zygote import Zygote

pytestmark = pytest.mark.ci

FLAGS = ["--max-steps", "6", "--precision", "fp32", "--output", "run", "--set", "training.ema=0.8"]


def weights(output: Path) -> list[list[float]]:
    return [
        [line[f"weight/{task}"] for task in ("sentiment", "paraphrase", "similarity")] for line in read_records(output)
    ]


def test_two_processes_average_and_weigh_as_one_does(zygote: Zygote, tmp_path: Path) -> None:
    """Also where each of them takes a part of the optimizer's step."""
    more = ["--set", "weighting.method=dwa", "--set", "weighting.window=2", "--set", "regularisation.r_drop=0.5"]
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        succeed(zygote, ranks, tmp_path / str(ranks), *FLAGS, *more, "--set", "training.shard=true")
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    same(one, two)
    np.testing.assert_allclose(weights(one), weights(two), rtol=1e-4)
    assert weights(one)[-1] != [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_two_processes_train_smart(zygote: Zygote, tmp_path: Path) -> None:
    """Each perturbs its own share; both end with the same weights, which uncertainties keep track of."""
    smart = ["--set", "regularisation.smart=1.0", "--set", "regularisation.proximal=1.0"]
    succeed(zygote, 2, tmp_path, *FLAGS, *smart, "--set", "weighting.method=uncertainty")
    assert np.isfinite(losses(tmp_path / "run")).all()
    assert np.isfinite(weights(tmp_path / "run")).all()
