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
from types import SimpleNamespace

import pytest
import torch.distributed.run

import benchmarks.run
from benchmarks import harness, precision
from minbert_fast import reproduce, train
from minbert_fast.common import cli
from minbert_fast.data import sample_directory
from minbert_fast.recipes.recipe import Recipe
from tests.pages import PAGES, ROOT, UNTRIED, Piece, elsewhere, filled, pieces
from tests.small import small_data

#: Trials of what a reader would run for longer.
FEW_STEPS = "2"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkout from inside, where commands may leave what they like."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "minbert_fast" / "data").mkdir(parents=True)
    (tmp_path / "minbert_fast" / "data" / "sample").symlink_to(sample_directory().data)
    (tmp_path / "filled").mkdir()
    small_data(tmp_path / "course")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # A benchmark's command line is tried here; tests/benchmarks tries what it would then measure.
    monkeypatch.setattr(harness, "ceilings", lambda device: harness.Ceilings(1e9, 1e9, 1e9))
    nothing = SimpleNamespace(run=lambda device, ceilings: [])
    monkeypatch.setattr(benchmarks.run, "importlib", SimpleNamespace(import_module=lambda name: nothing))
    # Without names it runs every recipe that published scores; tests/test_recipes_run.py trains each of them.
    monkeypatch.setattr(reproduce, "recipe_names", lambda: ["sbert-exp1", "default"])
    return tmp_path


def run_command(line: str, checkout: Path) -> None:
    if elsewhere(line):
        return
    words = shlex.split(line)
    while "=" in words[0]:
        words = words[1:]  # how many threads there may be is this process's own business
    if words[0] == "make" and words[1] in UNTRIED:
        subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)
        return
    words = filled(words, checkout / "course")
    if "--max-steps" in words and int(words[words.index("--max-steps") + 1]) > 50:
        words[words.index("--max-steps") + 1] = FEW_STEPS
    elif "--max-steps" not in words and {f"minbert_fast.{name}" for name in ("train", "search", "reproduce")} & {
        *words
    }:
        words += ["--max-steps", FEW_STEPS]
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[:3] == ["python", "-m", "benchmarks.run"]:
        assert benchmarks.run.main(words[3:]) == 0, line
    elif words[:3] == ["python", "-m", "benchmarks.precision"]:
        assert precision.main([*words[3:], "--steps", FEW_STEPS, "--batch-size", "4"]) == 0, line
    elif words[:2] == ["python", "-m"] and words[2].startswith("minbert_fast."):
        if "tensorboard,csv" in words:
            pytest.importorskip("tensorboard")
        assert cli.run(importlib.import_module(words[2]).main, words[3:]) == 0, line
    elif words[0] == "torchrun" and "--max-steps" in line:
        command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        # The fixture's folder is not the package.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        subprocess.run(command, env=environment, check=True, timeout=300)
    elif words[0] == "torchrun":  # for more devices or machines than there are: its flags, and what one process does
        parsed = torch.distributed.run.get_args_parser().parse_args(words[1:])
        assert parsed.training_script == "minbert_fast.train"
        assert cli.run(train.main, parsed.training_script_args) == 0, line
    else:
        pytest.fail(f"no way to try: {line}")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [page for page in PAGES if list(pieces(page))], ids=lambda page: page.name)
def test_everything_on_the_page_runs(page: Path, checkout: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for piece in pieces(page):
        print(f"{page.name}:{piece.line}: {piece.text.splitlines()[0]}")
        if piece.language == "command":
            run_command(piece.text, checkout)
        elif "--8<--" in piece.text:  # a file of docs/examples, which has a test of its own
            continue
        elif piece.language == "python":
            exec(compile(piece.text, page.name, "exec"), names)
        else:
            assert piece.language == "toml", f"{page.name}:{piece.line}: who tries {piece.language or 'plain text'}?"
            (checkout / "page.toml").write_text(piece.text)
            assert Recipe.load(str(checkout / "page.toml")).resolved_stages()


def test_no_command_escapes(tmp_path: Path) -> None:
    """Fenced, indented and inline ones are seen, in order; a fence where none is looked for is an error."""
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
        ("python -m minbert_fast.train --data HOST", "nothing to fill HOST"),
    ):
        with pytest.raises((AssertionError, ValueError), match=problem):
            run_command(line, checkout)
    with pytest.raises(pytest.fail.Exception, match="no way to try"):
        run_command("bash -c ls", checkout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_only_shown_exist(page: Path) -> None:
    """Indented commands need the reader's data, so only their flags are checked."""
    for module, rest in re.findall(r"python -m (minbert_fast(?:\.\w+)+)([^\n`]*)", page.read_text()):
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{page.name}: no {module}"
        assert spec.origin is not None
        source = Path(spec.origin).read_text()
        parser = getattr(importlib.import_module(module), "parser", None)
        for flag in re.findall(r"(?<!\w)--[a-z_-]+", rest):
            known = flag in parser()._option_string_actions if parser else f'"{flag}"' in source
            assert known, f"{page.name}: {module} has no {flag}"


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
