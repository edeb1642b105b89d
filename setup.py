# SPDX-License-Identifier: Apache-2.0
"""Builds the extension `minbert_fast._C` from csrc/ (metadata lives in pyproject.toml).

    csrc/*.cpp       compiled once
    csrc/cpu/*.cpp   compiled once per instruction set; the right one is picked at run time (csrc/isa.h)
    csrc/cuda/*.cu   compiled by nvcc when there is one; left out, saying so, when not

Environment: MINBERT_FAST_CUDA=0 leaves CUDA out, =1 makes its absence an error; MINBERT_FAST_CUDA_ARCHITECTURES names
the chips to build for ("90"; all); CUDA_HOME, CXX, CXXFLAGS, LDFLAGS as everywhere; MAX_JOBS bounds the compilers that run
at once. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".cu"))
HEADERS = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
CXX = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")

# Floating-point contraction and vectorised square roots are wanted; reassociation is not (results stay reproducible).
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
WARNINGS = ["-Wall", "-Wextra"]

# Kept in step with csrc/isa.h, which says what a processor must have for each.
AVX2 = ["-mavx2", "-mfma"]
# GCC 12 takes the undefined operands inside its own AVX-512 headers for mistakes of ours.
GCC_NOISE = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", *GCC_NOISE]
X86_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}

# Code for these GPUs, and PTX of the last one known, which later GPUs compile for themselves.
CUDA_ARCHITECTURES = [75, 80, 90, 100]
# Without contraction a result does not depend on which variant of a kernel computes it; hot loops call fmaf themselves.
NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Werror=all-warnings",
    "--threads=0",
]


def run(command: list[str]) -> None:
    """Run one compiler; its words reach the user as they are, and its failure ends the build."""
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def find_nvcc() -> Path | None:
    """nvcc by CUDA_HOME, the path, or the usual place; None when it is absent or not wanted."""
    wish = os.environ.get("MINBERT_FAST_CUDA", "auto")
    if wish == "0":
        print("minbert_fast: CUDA kernels left out, as MINBERT_FAST_CUDA=0 asks")
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    found = found or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found:
        return Path(found)
    if wish == "1":
        raise SystemExit("minbert_fast: MINBERT_FAST_CUDA=1, but there is no nvcc (set CUDA_HOME, or put it on PATH)")
    print("minbert_fast: no nvcc found (CUDA_HOME, PATH): building for the CPU only; GPUs will use Triton")
    return None


def cuda_library_folder(nvcc: Path) -> Path:
    """The folder of libcudart_static.a, from what nvcc itself says its top is (it may be a wrapper elsewhere)."""
    report = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", report, re.MULTILINE)
    tops = [Path(top.group(1).strip())] if top else [nvcc.resolve().parents[1]]
    for folder in (t / name for t in tops for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")):
        if (folder / "libcudart_static.a").exists():
            return folder
    raise SystemExit(f"minbert_fast: no libcudart_static.a beside {nvcc}; MINBERT_FAST_CUDA=0 builds without CUDA")


def architecture_flags(nvcc: Path) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    wished = os.environ.get("MINBERT_FAST_CUDA_ARCHITECTURES")
    wanted = [int(a) for a in wished.split()] if wished else CUDA_ARCHITECTURES
    chosen = [a for a in wanted if f"compute_{a}\n" in known]
    if not chosen:
        raise SystemExit(f"minbert_fast: {nvcc} knows none of the architectures {wanted}")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def accepts(flags: list[str]) -> bool:
    """Whether the compiler can build and link a program with `flags`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "try.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*CXX, *flags, str(source), "-o", str(Path(folder, "try"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def compile_source(source: Path, command: list[str], folder: Path) -> Path:
    """The object of `source` under `command`: its name holds a digest of the command, so flags never mix."""
    digest = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]
    target = folder / f"{source.stem}-{digest}{'.cuo' if source.suffix == '.cu' else '.o'}"
    newest = max(path.stat().st_mtime for path in (source, *HEADERS))
    if not target.exists() or target.stat().st_mtime <= newest:
        partial = target.with_suffix(".partial.o")
        run([*command, "-c", str(source), "-o", str(partial)])
        partial.replace(target)
    return target


class BuildNative(build_ext):
    """Compiles what changed, all at once, then links."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        libraries: list[str] = []
        defines: list[str] = []
        flags = [*CXX_FLAGS, *WARNINGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if accepts(["-fopenmp"]):
            flags.append("-fopenmp")
            libraries.append("-fopenmp")
        else:
            print("minbert_fast: the compiler has no OpenMP: CPU kernels will run on one thread")
        levels = {"portable": list[str]()}
        if platform.machine() in ("x86_64", "AMD64"):
            levels |= {isa: extra for isa, extra in X86_FLAGS.items() if accepts(extra)}
        defines += [f"-DMINBERT_HAS_{isa.upper()}" for isa in levels]

        jobs: list[tuple[Path, list[str]]] = []
        nvcc = find_nvcc()
        if nvcc:
            defines.append("-DMINBERT_HAS_CUDA")
            libraries += [f"-L{cuda_library_folder(nvcc)}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
            cuda_flags = [*NVCC_FLAGS, *architecture_flags(nvcc), *defines, f"-I{CSRC}"]
            jobs += [(s, [str(nvcc), *cuda_flags]) for s in sorted(CSRC.glob("cuda/*.cu"))]
        # Portable objects are linked first: should two of them hold one inline function of the standard library,
        # the linker keeps the first, which every processor can run.
        jobs += [(s, [*CXX, *flags, *defines, *includes]) for s in sorted(CSRC.glob("*.cpp"))]
        for isa, extra in levels.items():
            command = [*CXX, *flags, *extra, f"-DMINBERT_ISA={isa}", *defines, f"-I{CSRC}"]
            jobs += [(s, command) for s in sorted(CSRC.glob("cpu/*.cpp"))]

        workers = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            objects = list(pool.map(lambda job: compile_source(*job, folder), jobs))
        objects.sort(key=lambda path: path.suffix == ".cuo")

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = shlex.split(sysconfig.get_config_var("LDCXXSHARED") or "c++ -shared")
        link[:1] = CXX
        run([*link, *map(str, objects), *shlex.split(os.environ.get("LDFLAGS", "")), *libraries, "-o", str(target)])


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


setup(
    ext_modules=[Extension("minbert_fast._C", relative(SOURCES), depends=relative(HEADERS))],
    cmdclass={"build_ext": BuildNative},
)
