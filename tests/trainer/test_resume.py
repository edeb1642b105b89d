# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments of a real training process, then --resume: the files equal those of an uninterrupted run.

Every step writes a checkpoint here, so about half of the kills interrupt the writing of one.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minbert_fast.trainer.outputs import saved_recipe_path
from tests.small import MODEL_FILES, read_records, small_data, small_run
from tests.zygote import Zygote

pytestmark = pytest.mark.ci

TIMES = ("step_seconds", "time")
FLAGS = ("--lr", "1e-3", "--surgery", "pcgrad", "--set", "checkpoint.every=1")


def records(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_records(output)]


@pytest.fixture(scope="module")
def uninterrupted(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """Data, the output of a run on them, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = small_data(folder / "data")
    began = time.monotonic()
    assert zygote.run(small_run(data, folder / "whole", *FLAGS)) == 0
    return data, folder / "whole", time.monotonic() - began


def kill_and_resume(
    zygote: Zygote, uninterrupted: tuple[Path, Path, float], folder: Path, kills: int, seed: int
) -> None:
    """Kills and resumes runs until `kills` kills have happened; compares every run that gets to its end."""
    data, whole, seconds = uninterrupted
    chance = random.Random(seed)
    killed = runs = 0
    while killed < kills:
        output = folder / f"run{runs}"
        runs += 1
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            # On average long enough for a few steps, so that runs make progress.
            kill_after = chance.uniform(0.02, 0.9) * seconds if killed < kills else None
            again = ["--resume"] if saved_recipe_path(output).exists() else []  # killed before the run began
            status = zygote.run(small_run(data, output, *FLAGS, *again), kill_after)
            killed += status == -signal.SIGKILL
        assert status == 0, f"exit status {status} after {killed} kills"
        for name in MODEL_FILES:
            assert (output / name).read_bytes() == (whole / name).read_bytes(), f"{name} after {killed} kills"
        assert records(output) == records(whole)
        assert not [p.name for p in output.rglob("*") if ".writing-" in p.name or ".damaged" in p.name]


def test_killed_at_random_moments_and_resumed(
    zygote: Zygote, uninterrupted: tuple[Path, Path, float], tmp_path: Path
) -> None:
    kill_and_resume(zygote, uninterrupted, tmp_path, kills=4, seed=int(time.time()))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_fifty_random_moments_and_resumed(
    zygote: Zygote, uninterrupted: tuple[Path, Path, float], tmp_path: Path
) -> None:
    kill_and_resume(zygote, uninterrupted, tmp_path, kills=50, seed=7)


def test_terminated_and_resumed(zygote: Zygote, uninterrupted: tuple[Path, Path, float], tmp_path: Path) -> None:
    """SIGTERM gives exit status 143 and loses no step."""
    data, whole, _ = uninterrupted
    output = tmp_path / "run"
    (pid,) = zygote.start(small_run(data, output, *FLAGS))
    while not (output / "metrics.jsonl").exists() or len((output / "metrics.jsonl").read_text().splitlines()) < 4:
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() == [128 + signal.SIGTERM]
    assert zygote.run(small_run(data, output, *FLAGS, "--resume")) == 0
    for name in MODEL_FILES:
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert records(output) == records(whole)
