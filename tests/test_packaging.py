# SPDX-License-Identifier: Apache-2.0
"""What ships: the sdist holds the checkout, versions and ranges agree everywhere, one OpenMP runtime serves a process.

tests/wheel.sh builds the wheel from the sdist and tries it in a clean environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import minbert_fast

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
#: Serve the repository alone, or describe what goes into an sdist.
NOT_SHIPPED = {".gitignore", ".ci/run"}
#: Written by setuptools.
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|minbert_fast\.egg-info/.*")


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_sdist_holds_the_checkout(tmp_path: Path) -> None:
    """Sources, kernels, recipes, sample data, tests, docs and licence; nothing that was left lying about."""
    pytest.importorskip("pybind11")
    names = tracked()
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    for litter in (
        "csrc/old.o",
        "minbert_fast/_C.cpython-311-x86_64-linux-gnu.so",
        "tests/__pycache__/a.cpython-311.pyc",
    ):
        (tmp_path / "tree" / litter).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / litter).touch()
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "tree", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"minbert_fast-{minbert_fast.__version__}.tar.gz") as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {name for name in inside if not GENERATED.fullmatch(name)} == set(names) - NOT_SHIPPED
    for part in ("csrc/isa.h", "kernels/attention.py", "minbert_fast/recipes/default.toml", "LICENSE"):
        assert part in inside
    assert any(name.startswith("minbert_fast/data/sample/model/") for name in inside)


def test_the_version_comes_from_one_place() -> None:
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "minbert_fast.common.version.__version__"}
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(minbert_fast.__version__)}\b", changes, re.M)


def test_the_supported_ranges_are_the_same_everywhere() -> None:
    """pyproject.toml, README, quick start and the table of what was tried."""
    minors = [
        found[1] for text in PYPROJECT["project"]["classifiers"] if (found := re.search(r"Python :: (3\.\d+)$", text))
    ]
    assert PYPROJECT["project"]["requires-python"] == f">={minors[0]}"
    (torch,) = (text for text in PYPROJECT["project"]["dependencies"] if text.startswith("torch"))
    lowest = torch.removeprefix("torch>=")
    for page in ("README.md", "docs/quickstart.md", "docs/versions.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"Python {minors[0]} to {minors[-1]}" in text, page
        assert re.search(rf"torch {re.escape(lowest)} to 2\.15\b", text), page


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_one_openmp_runtime_serves_torch_and_the_extension() -> None:
    """Two would each keep a team of threads, and fight for the same cores."""
    code = """
import re, torch, minbert_fast.ops.native
torch.ones(1000, 1000).sum()
print(len(set(re.findall(r"/\\S*libgomp[^/\\s]*", open("/proc/self/maps").read()))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="paths are Linux's")
def test_an_install_without_isolation_works_from_any_directory(tmp_path: Path) -> None:
    """`pip install --no-build-isolation --no-deps -e .` in an environment that has torch, and no index to ask."""
    tree, home = tmp_path / "tree", tmp_path / "venv"
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    python = home / "bin" / "python"
    flags = {"MINBERT_FAST_CUDA": "0", "CXXFLAGS": "-O1", "PIP_NO_INDEX": "1"}  # compiled for seconds, not for speed
    install = ["install", "--no-build-isolation", "--no-deps", "-e", "."]
    done = subprocess.run(
        [python, "-m", "pip", *install], cwd=tree, env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = "from minbert_fast import _C, kernels; import minbert_fast; print(minbert_fast.__file__, _C.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tree)) for path in done.stdout.split())
