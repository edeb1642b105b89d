# SPDX-License-Identifier: Apache-2.0
"""The house rules that a reader relies on: who may import whom, licences, devices, recipes, commands of the README."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minbert_fast import train
from minbert_fast.config import Recipe, recipe_names
from minbert_fast.tasks import build_tasks

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minbert_fast"

# From the bottom up: a module imports from its own room and from those above it in this list.
ROOMS = (
    ("version", "schema", "storage", "pages", "products"),
    ("kernels",),
    ("reference",),
    ("config",),
    ("packing",),
    ("native",),
    ("functional",),
    ("flat",),
    ("solvers",),
    ("optim", "surgery", "pcgrad"),
    ("passes", "bert", "inference", "weights", "sentence_modules", "patching"),
    ("data",),
    ("tasks",),
    ("training",),
    ("cli", "predictor", "model_card"),
    ("train", "evaluate", "predict", "encode", "export", "recipes", "report", "search", "reproduce", "env"),
)
RANK = {name: rank for rank, room in enumerate(ROOMS) for name in room}

# Only here may code ask which device there is, or of what kind a tensor is: where implementations are chosen, where the
# command line's device is, and where the extension's entry point for a tensor is.
DEVICE_ASKERS = {"functional/backend.py", "functional/surgery.py", "training/device.py", "native/surgery.py"}
DEVICE_QUESTIONS = {"is_available", "is_cuda"}


def sources() -> list[Path]:
    found = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return sorted(path for path in found if path.name != "__init__.py" or path.parent != PACKAGE)


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Rooms of this package that a module imports when it runs; `if TYPE_CHECKING` blocks are for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            yield from imported_rooms(node)
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "minbert_fast" and len(parts) > 1:
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in RANK, f"{path}: give the new room {room!r} its place in ROOMS"
    for line, other in imported_rooms(ast.parse(path.read_text(encoding="utf-8"))):
        if other == "_C":
            assert room == "native", f"{path}:{line}: only native/ talks to the extension"
        elif other != "__version__":
            assert other in RANK, f"{path}:{line}: imports {other!r}, which has no place in ROOMS"
            assert RANK[other] <= RANK[room], f"{path}:{line}: {room} may not import {other}"


def test_the_order_catches_an_upward_import() -> None:
    """The test above can fail."""
    tree = ast.parse("def f():\n    from minbert_fast.training import loop\nimport minbert_fast.data.files")
    assert [room for _, room in imported_rooms(tree)] == ["training", "data"]
    assert RANK["training"] > RANK["data"] > RANK["bert"]


def test_benchmarks_and_tests_are_imported_by_nothing() -> None:
    for path in sources():
        assert not re.search(r"^\s*(from|import) (benchmarks|tests)\b", path.read_text(encoding="utf-8"), re.M), path


def test_kernels_hold_no_modules() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert not any(base.endswith("Module") for base in bases), f"{path}: {bases}"


def test_only_one_room_asks_for_devices() -> None:
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) in DEVICE_ASKERS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asked = isinstance(node, ast.Attribute) and node.attr in DEVICE_QUESTIONS
            assert not asked, f"{path}:{node.lineno}: asks {node.attr}"  # type: ignore[attr-defined]


def tracked(*patterns: str) -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_every_source_names_its_licence() -> None:
    paths = tracked("*.py", "*.pyi", "*.cpp", "*.cu", "*.cuh", "*.h", "*.sh")
    assert len(paths) > 50
    for path in paths:
        if not path.exists():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        first = lines[1] if lines and lines[0].startswith("#!") else lines[0]
        assert re.fullmatch(r"(#|//) SPDX-License-Identifier: Apache-2\.0", first), path


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_resolve(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    for stage in recipe.resolved_stages():
        assert stage.training.epochs > 0
    assert build_tasks(recipe)


def readme_commands() -> list[str]:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md in this installation")
    blocks = re.findall(r"^    +(.+)$|^```\w*\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S)
    return [line for indented, fenced in blocks for line in (indented or fenced).splitlines()]


def test_commands_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    commands = readme_commands()
    made = [name for line in commands for name in re.findall(r"\bmake ([a-z]+)", line)]
    assert {"train", "test"} <= set(made) <= targets
    modules = {name for line in commands for name in re.findall(r"python -m (minbert_fast\.\w+|benchmarks\.\w+)", line)}
    assert "minbert_fast.train" in modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module
    known = train.parser().format_help()
    for line in commands:
        if "minbert_fast.train" in line:
            _, _, own = line.partition("minbert_fast.train")  # what stands before is torchrun's
            for flag in re.findall(r"--[a-z][\w-]*", own):
                assert flag in known, f"{flag} in {line!r}"


def test_nothing_runs_at_import() -> None:
    """Importing every entry point neither parses arguments nor prints."""
    names = [p.stem for p in PACKAGE.glob("*.py") if RANK.get(p.stem) == RANK["train"] and p.stem != "report"]
    code = "import sys; sys.argv[1:] = ['--nonsense']\n" + "\n".join(f"import minbert_fast.{name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
