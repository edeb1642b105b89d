# SPDX-License-Identifier: Apache-2.0
"""The house rules that a reader relies on: who may import whom, licences, devices, commands of the README."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from minbert_fast import train

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minbert_fast"

# From the bottom up: a module imports from its own room and from those before it in this list.
ROOMS = (
    "common",
    "kernels",
    "ops",
    "surgery",
    "model",
    "data",
    "recipes",
    "tasks",
    "step",
    "parallel",
    "reporting",
    "trainer",
)
RANK = {room: rank for rank, room in enumerate(ROOMS)}
# The package's top level: the public face, and one thin file a command (`recipes` is a room with a `__main__`).
COMMANDS = ("compare", "encode", "env", "evaluate", "export", "predict", "report", "reproduce", "search", "train")
FACE = len(ROOMS)  # the rank of the top level: it may import from every room

# Only here may code ask which device there is, or of what kind a tensor is: where implementations are chosen, where the
# command line's device is, and where the extension's entry point for a tensor is.
DEVICE_ASKERS = {"ops/backend.py", "common/device.py", "ops/native/surgery.py"}
DEVICE_QUESTIONS = {"is_available", "is_cuda"}


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_of(path: Path) -> str:
    """The dotted name that `path` is imported by."""
    inside = path.relative_to(ROOT).with_suffix("")
    parts = ["minbert_fast", *inside.parts] if inside.parts[0] == "kernels" else list(inside.parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank_of(module: str) -> int:
    """The index of a module's room in ROOMS; the top level (`minbert_fast` and the commands) comes last."""
    parts = module.split(".")
    if parts[-1] == "__main__":  # a command that bears its room's name
        return FACE
    return RANK.get(parts[1], FACE) if len(parts) > 1 else FACE


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a source file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(nodes: Iterable[ast.AST], modules: Collection[str]) -> Iterator[tuple[int, str]]:
    """(line, module of this package) for each import, those for types included."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in inner]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "minbert_fast")


def circle(graph: Mapping[str, Collection[str]]) -> list[str] | None:
    """Modules that import each other in a ring, if any do."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        found = next((ring for name in graph.get(module, ()) if (ring := visit(name, [*path, module]))), None)
        done.add(module)
        return found

    return next((ring for module in graph if (ring := visit(module, []))), None)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    module = module_of(path)
    for line, other in imports(nodes_of(path), known_modules()):
        if other == "minbert_fast._C":
            assert module.startswith("minbert_fast.ops.native"), (
                f"{path}:{line}: only ops/native talks to the extension"
            )
        else:
            assert rank_of(other) <= rank_of(module), f"{path}:{line}: {module} may not import {other}"


@functools.cache
def known_modules() -> frozenset[str]:
    return frozenset({*map(module_of, sources()), "minbert_fast._C"})


def test_no_module_imports_itself_through_others() -> None:
    known = known_modules()
    graph = {module_of(path): {name for _, name in imports(nodes_of(path), known)} for path in sources()}
    assert circle({module: names - {module} for module, names in graph.items()}) is None


def test_every_room_has_its_place_and_its_purpose() -> None:
    """Each folder is in ROOMS and has a one-sentence description; other files are `__init__.py` and the commands."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders | {"kernels"} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *COMMANDS}
    for room in folders:
        purpose = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert purpose, room
        assert purpose.splitlines()[0].endswith("."), f"{room}: {purpose.splitlines()[0]!r} is no whole sentence"


def test_the_rules_above_can_fail() -> None:
    known = {"minbert_fast.trainer.loop", "minbert_fast.data.files"}
    tree = ast.parse("def f():\n    from minbert_fast.trainer import loop\nimport minbert_fast.data.files")
    assert {name for _, name in imports(ast.walk(tree), known)} == known
    assert (
        rank_of("minbert_fast.trainer.loop") > rank_of("minbert_fast.data.files") > rank_of("minbert_fast.model.bert")
    )
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_benchmarks_and_tests_are_imported_by_nothing() -> None:
    for path in sources():
        assert not re.search(r"^\s*(from|import) (benchmarks|tests)\b", path.read_text(encoding="utf-8"), re.M), path


def test_tests_stand_in_the_room_that_they_test() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    assert folders <= {*ROOMS, "benchmarks", "commands", "dropin", "without_gpu"}


def test_kernels_hold_no_modules() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in nodes_of(path):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert not any(base.endswith("Module") for base in bases), f"{path}: {bases}"


def test_only_one_room_asks_for_devices() -> None:
    for path in PACKAGE.rglob("*.py"):
        if str(path.relative_to(PACKAGE)) in DEVICE_ASKERS:
            continue
        for node in nodes_of(path):
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


def readme_commands() -> list[str]:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md in this installation")
    blocks = re.findall(r"^    +([^\n]+)$|^```\w*\n(.*?)^```", readme.read_text(encoding="utf-8"), re.M | re.S)
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
    """Importing the entry points, and what earlier pages imported, neither parses arguments nor prints.

    A model loads without torch's compiler, whose import takes longer than a short command.
    """
    code = """
import sys
sys.argv[1:] = ["--nonsense"]
from minbert_fast import *
from minbert_fast import cli
from minbert_fast.config import Recipe
from minbert_fast.packing import PackedBatch, pack
from minbert_fast.data import Label, Layout, add_format, read_table, sample_directory
from minbert_fast.tasks import Head, HeadOutput, Task, TaskInput, TaskOptions, register
before = set(sys.modules)
BertModel.from_pretrained(sample_directory().model)
assert not {"torch._dynamo", "torch.fx.experimental.symbolic_shapes"} & (sys.modules.keys() - before)
"""
    code += "\n".join(f"import minbert_fast.{name}" for name in [*COMMANDS, "recipes.__main__"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_architecture_page_is_true() -> None:
    """The page lists the rooms in import order, names existing files, and follows a batch in at most twelve steps."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/` \|", page, re.M) == list(ROOMS)
    named = re.findall(r"`([\w/]+(?:/|\.py|\.cpp))`", page)
    paths = [name for name in named if "/" in name.rstrip("/") or name.endswith("/")]
    assert len(paths) > 25
    for name in paths:
        inside_package = PACKAGE / name if name.rstrip("/") in ROOMS else ROOT / name
        assert inside_package.exists() or (ROOT / name).exists(), name
    steps = re.findall(r"^(\d+)\. .*`minbert_fast/", page, re.M)
    assert len(steps) == int(steps[-1]) <= 12
