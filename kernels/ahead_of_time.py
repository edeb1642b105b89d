# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for every supported chip without a GPU, and reports the resources each one uses.

    python -m minbert_fast.kernels.ahead_of_time [--target sm_90 ...] [--only attention ...] [--few] [--json FILE]

Prints registers a thread, spilled bytes, shared memory and matrix instructions of each kernel; exits with status 1 if
one fails to compile, spills registers, or needs more shared memory than the chip gives a block. The calls are the
launchers' own (see launches.py), but launching a kernel here means compiling it, by Triton's `warmup`. With `--few`, of
calls that differ in sizes alone only the last one, which is the largest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minbert_fast.kernels.launches import Launch, intercepted


@dataclass(frozen=True)
class Chip:
    """A compilation target and its limits."""

    name: str
    target: GPUTarget
    shared_bytes: int  # most shared memory of one block
    without: tuple[str, ...] = ()  # names of dtypes that no launch uses there

    def takes(self, launch: Launch) -> bool:
        return not any(dtype in launch.label for dtype in self.without)


CHIPS = (  # CUDA C++ Programming Guide, "Technical Specifications"
    Chip("sm_75", GPUTarget("cuda", 75, 32), 64 * 1024, without=("bfloat16", "float16")),  # trains in fp32
    Chip("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
    Chip("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),  # AMD CDNA 3 ISA, "Local data share"
)

MEASURED = "sm_90"  # the chip whose launch tables were measured


@dataclass(frozen=True)
class Report:
    """The resources of one kernel, compiled for one chip."""

    label: str
    kernel: str
    chip: str
    warps: int
    registers: int = 0  # a thread
    spill_bytes: int = 0  # a thread
    shared_bytes: int = 0  # a block
    matrix: str = ""  # matrix instructions by kind, "wgmma 8"
    failure: str = ""

    def __str__(self) -> str:
        line = f"{self.chip:7} {self.label:44} {self.kernel:28} {self.warps:5} {self.registers:9} {self.spill_bytes:5}"
        line += f" {self.shared_bytes:6}  {self.matrix}"
        return f"{line}  FAILED: {self.failure}" if self.failure else line


HEADER = f"{'chip':7} {'call':44} {'kernel':28} warps registers spill shared  matrix instructions"


def modules() -> dict[str, ModuleType]:
    """The files of kernels that define `launches`, by name."""
    package = importlib.import_module("minbert_fast.kernels")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    files = {name: importlib.import_module(f"minbert_fast.kernels.{name}") for name in names if name != "ahead_of_time"}
    return {name: file for name, file in files.items() if hasattr(file, "launches")}


def check(launch: Launch, chip: Chip) -> list[Report]:
    """Compiles what one launcher call launches, for one chip."""
    compiled: list[tuple[JITFunction[Any], Any]] = []

    def take(kernel: JITFunction[Any], grid: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        compiled.append((kernel, kernel.warmup(*args, grid=grid, **kwargs)))

    with intercepted(chip.target, take, chip.name):
        try:
            launch.call()
        except Exception as error:  # any error is this kernel's failure; the others go on
            lines = str(error).strip().splitlines() or [""]
            return [Report(launch.label, "", chip.name, 0, failure=f"{type(error).__name__}: {lines[-1][:200]}")]
    if not compiled:
        return [Report(launch.label, "", chip.name, 0, failure="no kernel was launched")]
    reports = [report(launch.label, kernel.__name__, binary, chip, launch.spilled) for kernel, binary in compiled]
    if chip.name == "sm_90":
        texts = [wrong_text(launch, binary.asm["ptx"]) for _, binary in compiled]
        reports = [replace(each, failure=each.failure or text) for each, text in zip(reports, texts, strict=True)]
    return reports


def wrong_text(launch: Launch, ptx: str) -> str:
    """What the text of one of the launch's kernels should hold or should not; empty where all is well."""
    if launch.needs not in ptx:
        return f"holds no {launch.needs}"
    return narrow_accesses(ptx) if launch.wide else ""


def narrow_accesses(ptx: str) -> str:
    """What is wrong with the widths of memory accesses in a kernel of tiles; empty where all are 16 bytes."""
    copies = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+)", ptx))
    if copies != {"0x10"}:
        return f"copies {', '.join(sorted(copies)) or 'nothing'} asynchronously instead of 16 bytes at a time"
    if "st.global.v4.b32" not in ptx:
        return "stores less than 16 bytes at a time"
    return ""


def report(label: str, name: str, binary: Any, chip: Chip, spilled: int = 0) -> Report:
    """The resources of a compiled kernel, which fails if it spills more than `spilled` bytes a thread."""
    if chip.target.backend == "cuda":
        registers, spill = _cuda_resources(binary.asm["cubin"])
        matrix = _count(binary.asm["ptx"], {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"})
    else:
        registers, spill = _amd_resources(binary.asm["amdgcn"])
        matrix = _count(binary.asm["amdgcn"], {"mfma": "v_mfma"})
    shared = int(binary.metadata.shared)
    failure = ""
    if spill > spilled:
        failure = f"spills {spill} bytes a thread"
    elif shared > chip.shared_bytes:
        failure = f"needs {shared} bytes of shared memory, {chip.name} has {chip.shared_bytes}"
    return Report(label, name, chip.name, int(binary.metadata.num_warps), registers, spill, shared, matrix, failure)


def _count(text: str, kinds: dict[str, str]) -> str:
    counts = {kind: len(re.findall(re.escape(pattern), text)) for kind, pattern in kinds.items()}
    return ", ".join(f"{kind} {count}" for kind, count in counts.items() if count)


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes a thread. Without calls and local arrays, a kernel's stack holds spills alone."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes a lane, from the metadata at the end of the assembly."""
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", assembly))
    return int(usage["vgpr_count"]), 4 * int(usage["vgpr_spill_count"])


def _check_one(module: str, label: str, chip: Chip) -> list[Report]:
    return check(next(each for each in modules()[module].launches() if each.label == label), chip)


def kind(label: str, chip: Chip) -> str:
    """The words of a launch's label that are neither sizes nor switches (`add=1`).

    On other chips than the measured one, 16-bit types are one, and the type of the results (`-> float32`) does not count.
    """
    if chip.name != MEASURED:
        label = label.partition(" ->")[0].replace("bfloat16", "float16")
    return " ".join(word for word in label.split() if not re.fullmatch(r"[\d.x,]+|\w+=[\d.]+", word))


def chosen(launches: Iterable[Launch], chip: Chip, few: bool) -> list[Launch]:
    """The launches to compile for the chip; with `few`, the last one of each kind."""
    taken = [launch for launch in launches if chip.takes(launch)]
    return list({kind(launch.label, chip): launch for launch in taken}.values()) if few else taken


def check_all(chips: Sequence[str], only: Sequence[str], few: bool) -> Iterator[Report]:
    """Reports of the `chosen` launches of every file (or of the files `only`), as they come, in order."""
    jobs = [
        (name, launch.label, chip)
        for name, module in modules().items()
        if not only or name in only
        for chip in CHIPS
        if chip.name in chips
        for launch in chosen(module.launches(), chip, few)
    ]
    # Processes that are forked need not import torch and Triton again.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        for reports in pool.map(_check_one, *zip(*jobs, strict=True)):
            yield from reports


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minbert_fast.kernels.ahead_of_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [chip.name for chip in CHIPS]
    parser.add_argument("--target", nargs="+", choices=names, default=names, help="chips to compile for (all)")
    parser.add_argument("--only", nargs="+", choices=sorted(modules()), default=[], help="files of kernels (all)")
    parser.add_argument("--few", action="store_true", help="of calls that differ in sizes alone only the largest")
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: the interpreter compiles nothing", file=sys.stderr)
        return 2
    reports = []
    print(HEADER)
    for report in check_all(options.target, options.only, options.few):
        reports.append(report)
        print(report, flush=True)
    failures = [report for report in reports if report.failure]
    print(f"Triton {triton.__version__}: {len(reports)} kernels compiled, {len(failures)} failed")
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 1 if failures or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
