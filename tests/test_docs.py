# SPDX-License-Identifier: Apache-2.0
"""Every command and every piece of Python in the README and in docs/ runs, and its pages name what exists."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minbert_fast import cli
from minbert_fast.data import sample_directory

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)
#: What continuous integration itself calls, from nothing.
MADE_BY_CI = {"make train", "make test"}


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(found[1], found[2]) for found in BLOCK.finditer(page.read_text())]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout from inside, where commands may leave what they like."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "minbert_fast" / "data").mkdir(parents=True)
    (tmp_path / "minbert_fast" / "data" / "sample").symlink_to(sample_directory().data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def run_command(line: str) -> None:
    words = shlex.split(line)
    if line in MADE_BY_CI:
        assert line in (ROOT / ".ci" / "run").read_text()
    elif words[0] == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        # The fixture's folder is not the package.
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONSAFEPATH": "1"})
    elif words[:2] == ["python", "-m"] and words[2].startswith("minbert_fast."):
        module = importlib.import_module(words[2])
        assert cli.run(module.main, words[3:]) == 0, line
    else:
        assert words[0] == "python", f"no way to try: {line}"
        subprocess.run([sys.executable, *words[1:]], check=True, timeout=300)


@pytest.mark.usefixtures("checkout", "one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_everything_on_the_page_runs(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for language, text in blocks(page):
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                run_command(line.split("  #")[0].strip())
        elif language == "python" and "--8<--" not in text:
            exec(compile(text, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_only_shown_exist(page: Path) -> None:
    """Indented commands need data of the reader's own; at least their flags must be there."""
    for module, rest in re.findall(r"python -m (minbert_fast(?:\.\w+)+)([^\n`]*)", page.read_text()):
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{page.name}: no {module}"
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        for flag in re.findall(r"(?<!\w)--[a-z_-]+", rest):
            assert f'"{flag}"' in source, f"{page.name}: {module} has no {flag}"


def test_the_worked_example_trains_and_is_evaluated(checkout: Path) -> None:
    data = checkout / "data"
    data.mkdir()
    words = {1: ("the cat sat", "a dog ran", "she is here"), 0: ("cat the sat", "dog a ran", "here is she the")}
    for split, repeats in (("train", 12), ("dev", 3)):
        rows = [
            f"{split}{i}{k}{j}\t{text}\t{k}" for i in range(repeats) for k in words for j, text in enumerate(words[k])
        ]
        (data / f"cola-{split}.csv").write_text("\n".join(["id\tsentence\tacceptable", *rows]) + "\n")
    example = ROOT / "docs" / "examples"
    command = [sys.executable, str(example / "acceptability.py")]
    train = ["train", "--data", str(data), "--recipe", str(example / "acceptability.toml"), "--output", "runs/cola"]
    done = subprocess.run([*command, *train, "--max-steps", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "acceptability_matthews" in done.stdout
    evaluate = ["evaluate", "--checkpoint", "runs/cola/best", "--data", str(data)]
    done = subprocess.run([*command, *evaluate], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_tests_that_pages_name_exist() -> None:
    for page in PAGES:
        for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
            assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{page.name}: {path}::{name}"
