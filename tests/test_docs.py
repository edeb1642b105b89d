# SPDX-License-Identifier: Apache-2.0
"""Every command and Python block in README and docs/ runs, and every file that these pages name exists."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.distributed.run

import benchmarks.run
from benchmarks import harness, precision
from minbert_fast import train
from minbert_fast.common import cli
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe
from minbert_fast.tasks.exporting import onnx_graph
from minbert_fast.trainer import reproduction
from tests.browser import browser, chromium
from tests.pages import PAGES, ROOT, UNTRIED, Piece, elsewhere, filled, pieces
from tests.small import small_data

#: Values of flags in place of those with which a reader waits longer.
FEW = {"--max-steps": "2", "--seeds": "1"}
TRAINING = {f"minbert_fast.{name}" for name in ("train", "search", "reproduce", "compare")}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkout's layout, where commands may write files."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "minbert_fast" / "data").mkdir(parents=True)
    (tmp_path / "minbert_fast" / "data" / "sample").symlink_to(sample_directory().data)
    (tmp_path / "filled").mkdir()
    small_data(tmp_path / "course")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # Only a benchmark's command line is tested here; tests/benchmarks tests the measurement.
    monkeypatch.setattr(harness, "ceilings", lambda device: harness.Ceilings(1e9, 1e9, 1e9))
    nothing = SimpleNamespace(run=lambda device, ceilings: [])
    monkeypatch.setattr(benchmarks.run, "importlib", SimpleNamespace(import_module=lambda name: nothing))
    # The 8-bit export traces the encoder that the export before it has traced.
    monkeypatch.setattr(onnx_graph, "_trace", partial(trace_once, onnx_graph._trace, tmp_path))
    # Without names it runs every recipe with published scores; tests/recipes/test_run.py trains each of them.
    monkeypatch.setattr(reproduction, "published_names", lambda: ["sbert-exp1"])
    return tmp_path


def trace_once(trace: Callable[..., None], kept: Path, graph: Any, example: Any, contents: Any, path: Path) -> None:
    """As `onnx_graph._trace`, which takes seconds, for a checkpoint that stays the same."""
    known = kept / f"traced-{contents.task}"
    if not known.exists():
        trace(graph, example, contents, known)
    shutil.copy(known, path)


def command_of(module: str) -> ModuleType:
    """The module that `python -m MODULE` runs."""
    found = importlib.import_module(module)
    return importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found


def run_command(line: str, checkout: Path) -> None:
    if elsewhere(line):
        return
    words = shlex.split(line)
    while "=" in words[0]:
        words = words[1:]  # drops environment variables: this process sets its own threads
    if words[0] == "make" and words[1] in UNTRIED:
        subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)
        return
    words = filled(words, checkout / "course")
    for flag, few in FEW.items():
        if flag in words:
            words[words.index(flag) + 1] = few
    if not {"--max-steps", "--resume", "--list"} & {*words} and TRAINING & {*words}:
        words += ["--max-steps", FEW["--max-steps"]]
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[:3] == ["python", "-m", "benchmarks.run"]:
        assert benchmarks.run.main(words[3:]) == 0, line
    elif words[:3] == ["python", "-m", "benchmarks.precision"]:
        assert precision.main([*words[3:], "--steps", "2", "--batch-size", "4"]) == 0, line
    elif words[:2] == ["python", "-m"] and words[2].startswith("minbert_fast."):
        assert cli.run(command_of(words[2]).main, words[3:]) == 0, line
    elif words[0] == "torchrun":  # checks the flags, runs one process; tests/parallel starts several
        parsed = torch.distributed.run.get_args_parser().parse_args(words[1:])
        assert parsed.training_script == "minbert_fast.train"
        assert cli.run(train.main, parsed.training_script_args) == 0, line
    else:
        pytest.fail(f"no way to run: {line}")


@pytest.mark.filterwarnings("ignore:.*runs as plain modules")  # what docs/using.md says of a changed model
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=() if page.name in ("README.md", "quickstart.md", "using.md") else pytest.mark.ci)
        for page in PAGES
        if list(pieces(page))
    ],
    ids=lambda page: page.name,
)
def test_everything_on_the_page_runs(page: Path, checkout: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for piece in pieces(page):
        print(f"{page.name}:{piece.line}: {piece.text.splitlines()[0]}")
        if piece.language == "command":
            run_command(piece.text, checkout)
        elif "--8<--" in piece.text:  # a file of docs/examples, which has a separate test
            continue
        elif piece.language == "python":
            exec(compile(piece.text, page.name, "exec"), names)
        else:
            assert piece.language == "toml", f"{page.name}:{piece.line}: no test runs {piece.language or 'plain text'}"
            (checkout / "page.toml").write_text(piece.text)
            recipe = Recipe.load(str(checkout / "page.toml"))
            assert recipe.resolved_stages()
            (checkout / f"{recipe.name}.toml").write_text(piece.text)  # a later command of the page may train it


def test_no_command_escapes(tmp_path: Path) -> None:
    """Finds fenced, indented and inline commands in order; an indented fence is an error."""
    page = tmp_path / "page.md"
    page.write_text(
        "Set up: `pip install\n-e .` and `make train`.\n\n    python -m a --b   what it does\n    not a command\n\n"
        "```bash\nOMP_NUM_THREADS=1 torchrun \\\n  x  # why\n\nls\n```\n\n```python\n`make no`\n```\n"
    )
    assert [(piece.language, piece.text) for piece in pieces(page)] == [
        ("command", "pip install -e ."),
        ("command", "make train"),
        ("command", "python -m a --b"),
        ("command", "OMP_NUM_THREADS=1 torchrun    x"),
        ("command", "ls"),
        ("python", "`make no`\n"),
    ]
    assert next(pieces(page)) == Piece("command", "pip install -e .", 1)
    for path in PAGES:
        assert not re.search(r"^[ \t]+```", path.read_text(), re.M), (
            f"{path.name}: a fence that is not at a line's start"
        )


def test_an_unknown_command_or_blank_fails(checkout: Path) -> None:
    for line, problem in (
        ("make nothing", "only"),
        ("python -m minbert_fast.train --data HOST", "no value for HOST"),
    ):
        with pytest.raises((AssertionError, ValueError), match=problem):
            run_command(line, checkout)
    with pytest.raises(pytest.fail.Exception, match="no way to run"):
        run_command("bash -c ls", checkout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_only_shown_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command names an existing module, and the module's --help lists every flag."""
    for module, rest in re.findall(r"python -m (minbert_fast(?:\.\w+)+)([^\n`]*)", page.read_text()):
        with pytest.raises(SystemExit) as ended:
            command_of(module).main(["--help"])
        assert ended.value.code == 0
        known = set(re.findall(r"(?<!\w)--[a-z_-]+", capsys.readouterr().out))
        for flag in re.findall(r"(?<!\w)--[a-z_-]+", rest):
            assert flag in known, f"{page.name}: {module} has no {flag}"


@pytest.mark.ci
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs")
def test_the_built_site_needs_no_network_and_search_works_from_disk(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True, timeout=300)
    for html in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?(https?:[^ \">]+)", html.read_text())
        assert not loaded, f"{html.name} loads {loaded}"
    if chromium() is None:
        return
    with browser(tmp_path / "profile") as tab:
        tab.open(site / "index.html")
        tab.evaluate(
            "{ const query = document.querySelector('[data-md-component=search-query]'); query.focus();"
            " query.value = 'sharding'; query.dispatchEvent(new KeyboardEvent('keyup', { bubbles: true })) }"
        )
        found, deadline = "", time.monotonic() + 30
        while "Several GPUs" not in found and time.monotonic() < deadline:
            found = tab.evaluate("document.querySelector('.md-search-result').innerText")
            time.sleep(0.2)
    assert "Several GPUs, several machines" in found


def test_the_tests_that_pages_name_exist() -> None:
    for page in PAGES:
        for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
            assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{page.name}: {path}::{name}"
