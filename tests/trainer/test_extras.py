# SPDX-License-Identifier: Apache-2.0
"""Whole runs with everything that a recipe may add to a plain step: cut and resumed, and into the next stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from minbert_fast import train
from minbert_fast.common import cli
from tests.small import small_data, small_run

pytestmark = pytest.mark.usefixtures("one_thread")

ADDED = ("training.ema=0.8", "weighting.window=3", "regularisation.proximal=0.5")


@pytest.mark.parametrize("more", [("weighting.method=dwa", "regularisation.r_drop=0.5"), ("regularisation.smart=0.5",)])
def test_a_run_cut_and_resumed_is_as_never_cut(more: tuple[str, ...], tmp_path: Path) -> None:
    """Step 4 is within an epoch and within a window; each step draws new dropout masks and perturbations."""
    data = small_data(tmp_path / "data")
    flags = [word for value in (*ADDED, *more) for word in ("--set", value)]
    flags += ["--max-steps", "6", "--set", "training.evaluate_untrained=false"]
    for name, cuts in (("whole", ("6",)), ("cut", ("4", "6"))):
        for steps in cuts:
            again = ("--resume",) if steps != cuts[0] else ()
            run = small_run(data, tmp_path / name, "--surgery", "pcgrad", "--stop-after", steps, *flags, *again)
            assert cli.run(train.main, run) == 0
    for file in ("last/model.safetensors", "last/heads.safetensors", "best/model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


def test_the_average_of_one_stage_is_where_the_next_one_starts(tmp_path: Path) -> None:
    """A second stage that trains heads alone keeps the first one's averaged encoder."""
    data = small_data(tmp_path / "data")
    values = ("tasks.sentiment.neighbours=3", "training.start=last", "training.evaluate_untrained=false")
    flags = ["--recipe", "bertology-sst-to-sts", "--lr", "1e-3", "--epochs", "1"]
    flags += [word for value in values for word in ("--set", value)]
    encoders = []
    for decay, steps in (
        ("0.0", "10"),
        ("0.5", "10"),
        ("0.5", "13"),
    ):  # the first stage has 5 batches of each pair task
        output = tmp_path / f"{decay}-{steps}"
        run = small_run(data, output, *flags, "--stop-after", steps, "--set", f"training.ema={decay}")
        assert cli.run(train.main, run) == 0
        encoders.append(load_file(output / "last" / "model.safetensors"))
    last, averaged, frozen = encoders
    name = "encoder.layer.0.attention.self.query.weight"
    assert not last[name].equal(averaged[name])
    assert all(frozen[key].equal(tensor) for key, tensor in averaged.items())
