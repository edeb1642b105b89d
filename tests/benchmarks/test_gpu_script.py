# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.sh with a Python that does nothing: its parts, their limits, what it reports and packs. And the profile."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.gradients import CONFIGS
from benchmarks.harness import ROOT
from benchmarks.step_profile import REST, group_of, grouped

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def run(folder: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in a copy of its folder, so that it writes nothing in the checkout."""
    (folder / "benchmarks").mkdir(exist_ok=True)
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", folder / "benchmarks")
    command = ["bash", str(folder / "benchmarks" / "gpu.sh"), *parts]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_dry_run_names_every_part_with_its_limit(tmp_path: Path) -> None:
    real = {"MINBERT_FAST_DATA": "data", "MINBERT_FAST_MINILM": "model"}
    lines = run(tmp_path, DRY_RUN="1", PYTHON="true", **real).stdout.splitlines()
    parts = "build, tests, kernel tests, profile, step, kernels, surgery, encode, train, dropin"
    for part in parts.split(", "):
        assert any(line.startswith(f"== {part}, at most ") for line in lines), part
    assert any(line.startswith("== compiled, at most") for line in lines)
    assert any(line.startswith("== sanitizer memcheck, at most") for line in lines)
    assert any(line.startswith("== reproduce, at most") for line in lines)
    assert any(line.startswith("== ideas, at most") for line in lines)


def test_results_are_packed_and_a_failure_shows(tmp_path: Path) -> None:
    good = run(tmp_path, "profile", "tests", PYTHON="true")
    assert good.returncode == 0, good.stderr
    assert "profile: passed" in good.stdout
    assert (tmp_path / "gpu-results.tar.gz").is_file()
    bad = run(tmp_path, "profile", "tests", PYTHON="false")
    assert bad.returncode == 1
    assert bad.stdout.count("FAILED") == 3  # the profile, and both groups of tests
    assert "no part what" in run(tmp_path, "what", PYTHON="true").stderr


def test_a_command_ends_at_its_limit(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/bash\necho begun\nexec sleep 50\n")
    slow.chmod(0o755)
    found = run(tmp_path, "profile", PYTHON=str(slow), LIMIT="1")
    assert "begun" in found.stdout
    assert "profile: FAILED (124)" in found.stdout


def test_kernels_of_a_profile_are_grouped() -> None:
    kernels = [("_weight_gradients", 900.0, 2), ("nvjet_sm90_tst_192x96", 80.0, 4), ("something_new", 2.0, 2)]
    assert grouped(kernels, replays=2) == [
        {"kernels": "weight gradients", "microseconds": 450.0, "launches": 1.0},
        {"kernels": "matrix products", "microseconds": 40.0, "launches": 2.0},
        {"kernels": REST, "microseconds": 1.0, "launches": 1.0},
    ]
    assert group_of("void minbert::cuda::gram_small<minbert::bfloat16, 3, true>") == "Gram matrix"
    assert group_of("void minbert::cuda::adamw_kernel<float, 1, true>") == "AdamW, dense and rows"
    assert set(CONFIGS) == {"BERT-base", "MiniLM-L6"}
