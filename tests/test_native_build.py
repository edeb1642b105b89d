# SPDX-License-Identifier: Apache-2.0
"""The compiled extension as a file: what it links to, which processors and GPUs it serves, that sanitizers like it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minbert_fast import _C
from minbert_fast.ops import native

ROOT = Path(__file__).parents[1]
EXTENSION = Path(_C.__file__ or "")


# The extension alone, without the two seconds that torch takes.
LOAD = (
    "import importlib.util as u\n"
    f"spec = u.spec_from_file_location('minbert_fast._C', {str(EXTENSION)!r})\n"
    "C = u.module_from_spec(spec)\nspec.loader.exec_module(C)\n"
)


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code`, in which C is the extension."""
    command = [sys.executable, "-c", LOAD + code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_the_tests_run_the_build_they_mean_to() -> None:
    """tests/sanitize.sh puts its own build first on the path; a run that missed it would prove nothing."""
    folder = os.environ.get("MINBERT_FAST_SANITIZED")
    assert folder is None or EXTENSION.is_relative_to(folder)
    if folder is not None and folder.endswith("thread"):
        assert torch.get_num_threads() > 1, "with one thread there is nothing to find"


# Errors that each build of tests/sanitize.sh must report if the checks before the extension are bypassed.
PROVOCATIONS = {
    # A J one element shorter than it claims is read beyond its end.
    "sanitized-address": (
        "AddressSanitizer: heap-buffer-overflow",
        "J, out = torch.zeros(2, 1000), torch.zeros(2, 2)\n"
        "work = torch.empty(C.gram_workspace(C.Where(-1, 0, 1), 2, 1001), dtype=torch.uint8)\n"
        "C.gram(C.Where(-1, 0, 1), C.Matrix(J.data_ptr(), 0, 2, 1001, 1000), work.data_ptr(), out.data_ptr(), False)",
    ),
    # Two calls that write to one place at a time.
    "sanitized-thread": (
        "ThreadSanitizer: data race",
        "from threading import Thread\n"
        "x, out, bounds = torch.ones(640, 256), torch.zeros(1, 256), torch.tensor([0, 640], dtype=torch.int32)\n"
        "threads = [Thread(target=lambda: [C.column_sums(x, bounds, out, 1) for _ in range(200)]) for _ in range(2)]\n"
        "[thread.start() for thread in threads]\n[thread.join() for thread in threads]",
    ),
}


@pytest.mark.skipif("MINBERT_FAST_SANITIZED" not in os.environ, reason="an ordinary build, not tests/sanitize.sh's")
@pytest.mark.parametrize("isa", _C.isas().split())
def test_the_sanitizer_would_speak(isa: str) -> None:
    finding, code = PROVOCATIONS[Path(os.environ["MINBERT_FAST_SANITIZED"]).name]
    code = "import torch\n" + code
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "ignore_noninstrumented_modules=1"}
    assert finding in in_new_process(code, MINBERT_FAST_ISA=isa, **options).stderr


def test_instruction_set_can_be_chosen_by_the_environment() -> None:
    for isa in _C.isas().split():
        run = in_new_process("print(C.isa())", MINBERT_FAST_ISA=isa)
        assert run.stdout.strip() == isa, run.stderr


def test_an_unknown_instruction_set_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no instruction set 'mmx' here.* have: portable"):
        _C.set_isa("mmx")
    run = in_new_process("C.isa()", MINBERT_FAST_ISA="mmx")
    assert "no instruction set 'mmx' here" in run.stderr


def test_the_best_instruction_set_is_the_default() -> None:
    run = in_new_process("print(C.isa())", MINBERT_FAST_ISA="")
    assert run.stdout.strip() == _C.isas().split()[-1]


def test_links_neither_torch_nor_a_cuda_library() -> None:
    """One build serves every torch version, and imports where there is no driver."""
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("readelf is not installed")
    report = subprocess.run([readelf, "-d", EXTENSION], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", report)
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda|cudart|python", name)]


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compiles_without_instructions_of_x86(compiler: str) -> None:
    """What AArch64 compiles: code of vectors alone. It held a builtin function that GCC has and Clang lacks."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-U__SSE2__", "-DMINBERT_HAS_PORTABLE"]
    command = [compiler, *flags, "-DMINBERT_ISA=portable", f"-I{ROOT / 'csrc'}", *map(str, sources)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def cuobjdump() -> str:
    """From the path, or the copy inside Triton."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if not found:
        pytest.skip("cuobjdump is not installed")
    return found


@pytest.mark.skipif(not native.HAS_CUDA, reason="built without CUDA (no nvcc, or MINBERT_FAST_CUDA=0)")
def test_cuda_kernels_spill_nothing() -> None:
    """Every kernel for every architecture lives in registers; their counts are printed (pytest -s)."""
    report = subprocess.run([cuobjdump(), "-res-usage", EXTENSION], capture_output=True, text=True, check=True).stdout
    architectures = set(re.findall(r"arch = (sm_\d+)", report))
    assert {"sm_75", "sm_80", "sm_90", "sm_100"} <= architectures
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert len(kernels) > 100
    for name, registers, stack, shared, local in kernels:
        print(f"{registers:>4} registers {shared:>6} bytes shared  {name}")
        assert (stack, local) == ("0", "0"), f"{name} spills: {stack} bytes of stack, {local} local"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [75, 80, 90, 100])
def test_cuda_compiles_without_a_warning(architecture: int, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("nvcc is not installed")
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        command = [
            nvcc,
            "-cubin",
            f"-arch=sm_{architecture}",
            "-std=c++17",
            "-O3",
            "-fmad=false",
            "-Werror=all-warnings",
        ]
        command += ["-Xptxas=-v", f"-I{ROOT / 'csrc'}", "-DMINBERT_HAS_CUDA", str(source), "-o", str(tmp_path / "x")]
        report = subprocess.run(command, capture_output=True, text=True, check=False)
        assert report.returncode == 0, report.stderr
        used = re.findall(r"Used (\d+) registers", report.stderr)
        print(f"sm_{architecture} {source.name}: {len(used)} kernels, at most {max(map(int, used))} registers")
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report.stderr)
        assert used
        assert set(spills) <= {"0"}, report.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_sanitizers_find_nothing(kind: str) -> None:
    if sys.platform != "linux" or not shutil.which("c++"):
        pytest.skip("needs Linux and a C++ compiler")
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "2"}
    command = [ROOT / "tests" / "sanitize.sh", kind]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
