# SPDX-License-Identifier: Apache-2.0
"""The commands and code on README and docs pages, in order, and where a command runs that a test cannot run."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from minbert_fast.data import sample_directory

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_COMMAND = r"(?:[A-Z_]+=\S+ )*(?:python3?|pip|make|torchrun|pytest|mkdocs|bash|sh|git|docker)"
_PIECE = re.compile(
    r"^```(?P<language>\w*)[^\n]*\n(?P<block>.*?)^```$"
    rf"|^    (?P<indented>{_COMMAND} (?:[^\n\\]|\\\n|\\.)+)$"
    rf"|(?<!`)`(?P<inline>{_COMMAND} (?:[^`\n]|\n(?!\n))+)`(?!`)",
    re.S | re.M,
)


class Piece(NamedTuple):
    """A fenced block in a language, or a command (language `command`), and its line on the page."""

    language: str
    text: str
    line: int


def pieces(page: Path) -> Iterator[Piece]:
    """Fenced blocks whole (`bash` blocks line by line), indented commands and inline commands, in page order."""
    source = page.read_text(encoding="utf-8")
    for found in _PIECE.finditer(source):
        line = source.count("\n", 0, found.start()) + 1
        if found["language"] == "bash":
            for command in found["block"].replace("\\\n", " ").splitlines():
                if command.strip():
                    yield Piece("command", command.split("  #")[0].strip(), line)
        elif found["block"] is not None:
            yield Piece(found["language"], found["block"], line)
        else:
            command = found["indented"] or " ".join(found["inline"].split())
            command = re.sub(r"\s*\\\n\s*", " ", command)
            yield Piece(
                "command", re.split(r"\s{2,}", command)[0], line
            )  # two spaces separate a command from its explanation


# ---- Commands with placeholders for the reader to fill in -------------------------------------------------------------

_BLANK = re.compile(r".*\b(?:DIR|FILE|NAME|COLUMN|HUB_NAME|HOST|PORT)\b.*|\[.*|\.\.\.")


def filled(words: Sequence[str], data: Path) -> list[str]:
    """The words of a command with placeholders filled from the sample. Raises ValueError for an unknown placeholder."""
    sample = sample_directory()
    values: Mapping[tuple[str, str], object] = {
        ("--data", "DIR"): data,
        ("--data", "FILE"): sample.data / "ids-sst-train.csv",
        ("--text", "COLUMN"): "sentence",
        ("--label", "COLUMN"): "sentiment",
        ("--model", "DIR"): sample.model,
        ("--model", "DIR|HUB_NAME"): sample.model,
        ("--output", "DIR"): "filled/directory",
        ("--output", "FILE"): "filled/predictions.csv",
        ("--output", "FILE.npy"): "filled/vectors.npy",
        ("--input", "FILE"): sample.data / "ids-sst-dev.csv",
        ("--input", "FILE.txt"): sample.data / "ids-sst-dev.csv",
    }
    result: list[str] = []
    for word in words:
        value = values.get((result[-1] if result else "", word), word)
        if value is word and _BLANK.fullmatch(word):
            raise ValueError(f"no value for {word} in {shlex.join(words)}")
        result.append(str(value))
    return result


# ---- Commands that something else runs, or that run only on the reader's machine --------------------------------------

#: Commands that something else runs: pattern -> (file that runs it, pattern of the line in that file).
_ELSEWHERE = {
    r"pip install -e \.": ("Makefile", r"pip install .*-e '\."),
    r"pip install --no-build-isolation --no-deps -e \.": (".ci/run", r"--run-slow tests/test_packaging\.py"),
    r"pip install --upgrade setuptools pybind11 ninja": (
        "pyproject.toml",
        r'requires = \["setuptools.*pybind11.*ninja',
    ),
    r"pytest --run-slow": ("tests/conftest.py", r'addoption\("--run-slow"'),
    r"python -m minbert_fast\.kernels\.ahead_of_time --target sm_90": (".ci/run", r"ahead_of_time --target .*sm_90"),
    r"python docs/examples/trainer\.py .*": ("tests/model/test_patching.py", r'"examples" / "trainer\.py"'),
    r"python -m benchmarks\.readme.*": ("tests/benchmarks/test_readme.py", r"readme"),
    r"python -m benchmarks\.ablation": ("tests/benchmarks/test_ablation.py", r"ablation\.main"),
}
#: Makefile targets that continuous integration does not run (no GPU, hours of measuring, a separate environment). A test
#: checks that they parse.
UNTRIED = {"gpu", "bench", "wheel"}


def elsewhere(line: str) -> bool:
    """Whether something else runs the command; asserts that it still does."""
    if made := re.fullmatch(r"make (\w+)", line):
        runs = re.findall(r"^\s*(?:\w+=\S+ )*make (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
        known = {target for targets in runs for target in targets.split()}
        assert made[1] in known | UNTRIED, f"{line}: continuous integration runs only {sorted(known)}"
        return made[1] in known
    if extra := re.fullmatch(r"pip install '(?:minbert[-_]fast|\.)\[([\w,]+)\]'", line):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert set(extra[1].split(",")) <= set(project["optional-dependencies"]), line
        return True
    for pattern, (file, words) in _ELSEWHERE.items():
        if re.fullmatch(pattern, line):
            assert re.search(words, (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file} no longer has {line}"
            return True
    return False
