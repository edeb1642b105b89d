# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels of csrc/cuda on the CPU: tests and sanitizers check them without a GPU.

A C++ compiler compiles the sources, after a few substitutions, with our `cuda_runtime.h`. The threads of a block
take turns at barriers and shuffles, in rising or falling order, launch by launch: without a barrier that is needed, two
launches differ. Shared memory starts as NaN. A barrier or shuffle that some threads do not reach is an error, as are sizes
that no GPU launches. Compiled with CXXFLAGS for AddressSanitizer, UndefinedBehaviorSanitizer or ThreadSanitizer
(tests/sanitize.sh), accesses out of bounds, misaligned ones, and races inside a block are found as in any C++.

It does not show: times, registers, races between blocks that do not change a result, nor what nvcc and a GPU round or
order differently from C++.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from minbert_fast.ops import backend, native

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RUNNER = [Path(__file__), HERE / "cuda_runtime.h", HERE / "runner.cpp"]
NAME = "cuda on cpu"

# No contraction, as setup.py tells nvcc; and nvcc too includes cuda_runtime.h by itself.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off"]
FLAGS += ["-D__CUDACC__", "-DMINBERT_HAS_CUDA", f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-include", "cuda_runtime.h"]


def translate(text: str) -> str:
    """CUDA as C++: launches, shared arrays and launch bounds become calls of the runner (cuda_runtime.h)."""
    kernel, configuration, arguments = r"([\w:]+(?:<[\w., ]*>)?)", r"<<<([^;]*?)>>>", r"(\([^;]*\));"
    text = re.sub(rf"{kernel}\s*{configuration}{arguments}", r"::gpu::launch(\2, [&] { \1\3; });", text)
    shared = r"__shared__ (alignas\(\d+\) )?([\w ]+ (\w+)(?:\[[^;]*\])?;)"
    text = re.sub(shared, r"\1static \2 ::gpu::shared(&\3, sizeof \3);", text)
    return re.sub(r"(__launch_bounds__\(([^,)]+)[^;{]*\{)", r"\1 ::gpu::bound(\2);", text)


def build(sources: Sequence[Path]) -> Path:
    """A shared library of the CUDA and C++ sources and the runner, in build/; skips the test where there is none."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform != "linux" or not shutil.which(compiler[0]):
        pytest.skip("needs Linux and a C++ compiler")
    sanitizers = shlex.split(os.environ.get("CXXFLAGS", ""))
    texts = [path.read_bytes() for path in (*sources, *RUNNER, *sorted((ROOT / "csrc").glob("**/*.*h")))]
    digest = hashlib.sha256(b"\0".join([*texts, shlex.join([*compiler, *FLAGS, *sanitizers]).encode()])).hexdigest()
    folder = ROOT / "build" / "cuda_on_cpu" / digest[:16]
    library = folder / "library.so"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # no sanitizer in the compiler

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if source.suffix == ".cu":
            text = f'#line 1 "{source}"\n{translate(source.read_text())}'
            source = folder / f"{source.stem}.cpp"
            source.write_text(text)
        run(*compiler, *FLAGS, *(sanitizers if source != RUNNER[-1] else []), "-c", source, "-o", target)
        return target

    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of pytest-xdist wait, and find the library
        if not library.exists():
            objects = list(pool.map(compiled, [*sources, RUNNER[-1]]))
            run(*compiler, "-shared", *sanitizers, *objects, "-ldl", "-o", folder / "partial.so")
            (folder / "partial.so").replace(library)
    return library


def _struct(name: str, **members: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(members.items())})


_P, _D, _I = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64
_STRUCTS = [  # of csrc/surgery.h
    _struct("Where", device=ctypes.c_int, stream=_P, threads=ctypes.c_int),
    _struct("Matrix", data=_P, dtype=ctypes.c_int, rows=_I, columns=_I, stride=_I),
    _struct("AdamW", p=_P, m=_P, v=_P, scalars=_P, copy=_P, row_slot=_P, lr_factor=_D, beta1=_D, beta2=_D, eps=_D,
            weight_decay=_D, correct_bias=ctypes.c_bool, count=_I, width=_I),
]  # fmt: skip


def _argument(value: Any) -> Any:
    """A Python argument as C++ takes it: addresses and integers alike fill a register."""
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    kind = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float}[type(value)]
    return kind(value)


@functools.cache
def extension() -> SimpleNamespace:
    """The part of `minbert_fast._C` that ops/native/surgery.py uses, with the CUDA ops in place of the CPU's.

    `processors.value`: how many the GPU has.
    """
    library = ctypes.CDLL(str(build([*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "ops.cpp"])))
    library.last_error.restype = ctypes.c_char_p

    def op(name: str) -> Callable[..., int]:
        function = ctypes.CFUNCTYPE(ctypes.c_int64).in_dll(library, name)

        def call(*arguments: Any) -> int:
            result: int = function(*map(_argument, arguments))
            if result == -1:
                raise RuntimeError(library.last_error().decode())
            return result

        return call

    names = re.findall(r"OP\(\w+, (\w+),", (ROOT / "csrc" / "surgery.h").read_text())
    processors = ctypes.c_int.in_dll(library, "processors")
    structs = {struct.__name__: struct for struct in _STRUCTS}
    return SimpleNamespace(processors=processors, **structs, **{name: op(name) for name in names})


@contextmanager
def running(implementation: str, device: torch.device) -> Iterator[None]:
    """`backend.force` for tensors on `device`; also takes "cuda on cpu", which skips the test on a GPU."""
    if implementation != NAME:
        with backend.force(implementation):  # type: ignore[arg-type]
            yield
        return
    if device.type == "cuda":
        pytest.skip("CUDA's kernels on the CPU take the CPU's tensors")
    with backend.force("native"), mock.patch.object(native.surgery, "_C", extension()):
        yield
