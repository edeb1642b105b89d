# SPDX-License-Identifier: Apache-2.0
"""Shared by all benchmarks: checked candidates, interleaved timing, the machine's measured ceilings, rows of results.

A suite is a function `run(device, ceilings) -> Iterable[Row]` (see benchmarks/run.py). It builds cases. A case has several
candidates that compute the same result in different ways. They are timed in turns in one process, so that noise of the
machine affects all of them equally. A candidate whose check fails, or that raises, is reported and not timed.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minbert_fast.common import huge_pages
from minbert_fast.common.errors import first_line
from minbert_fast.common.provenance import cores, current_commit, package_version, processor

ROOT = Path(__file__).parents[1]

#: (functions by name, device) -> milliseconds of each.
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], dict[str, list[float]]]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case's result, with the least bytes that it must move and the least FLOPs that it must do."""

    run: Callable[[], object]
    check: Callable[[], object] | None = None  # raises AssertionError if the result is wrong
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine: bytes/s (read plus written) of a large copy, FLOP/s of a large matrix product."""

    copy: float
    fp32: float
    bf16: float


@dataclass
class Row:
    """The result of one candidate in one case. Times are in milliseconds."""

    suite: str
    case: str
    name: str
    median: float | None = None
    p10: float | None = None
    p90: float | None = None
    repeats: int = 0
    gigabytes_per_second: float | None = None
    of_copy: float | None = None  # share of the copy bandwidth
    tflops: float | None = None
    of_product: float | None = None  # share of the rate of fp32 (or bf16) products
    tokens: int | None = None  # without padding
    tokens_per_second: float | None = None
    working_megabytes: float | None = None  # needed during a step only
    speedup: dict[str, float] = field(default_factory=dict)  # over each baseline of the case
    note: str = ""


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 15, seconds: float = 10.0
) -> dict[str, list[float]]:
    """Milliseconds of each function, `repeats` times; each round calls every function once. A warm-up does not count.

    A function that has taken `seconds` in total is not called again.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        warm = time_one(function, device)
        if warm > 1e3 * seconds:  # no time for a second call
            times[name].append(warm)
    for _ in range(repeats):
        for name, function in functions.items():
            if sum(times[name]) < 1e3 * seconds:
                times[name].append(time_one(function, device))
    return times


def time_one(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, which starts and ends with an idle device."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def case(
    suite: str,
    name: str,
    candidates: Mapping[str, Candidate],
    device: torch.device,
    ceilings: Ceilings,
    *,
    baselines: Iterable[str] = (),
    product: str = "fp32",
    timer: Timer = measure,
) -> list[Row]:
    """Checks all candidates, times those that pass, and computes their speedups over each of `baselines`.

    `timer` replaces `measure` where the host's clock is too coarse.
    """
    rows = {key: Row(suite, name, key) for key in candidates}
    for key, candidate in candidates.items():
        try:
            (candidate.check or candidate.run)()
        except AssertionError as error:
            rows[key].note = f"WRONG RESULT, not timed: {first_line(error)}"
        except Exception as error:  # an error in another library must not end the suite
            rows[key].note = f"FAILED, not timed: {type(error).__name__}: {first_line(error)}"
    sound = {key: c.run for key, c in candidates.items() if not rows[key].note}
    for key, times in timer(sound, device).items():
        _fill(rows[key], candidates[key], times, ceilings, product)
    for row in rows.values():
        for baseline in baselines:
            other = rows[baseline].median
            if row.name != baseline and row.median and other:
                row.speedup[baseline] = round(other / row.median, 2)
    return list(rows.values())


def _fill(row: Row, candidate: Candidate, times: list[float], ceilings: Ceilings, product: str) -> None:
    row.repeats = len(times)
    row.median = statistics.median(times)
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    row.p10, row.p90 = deciles[0], deciles[-1]
    seconds = row.median / 1e3
    if candidate.bytes:
        row.gigabytes_per_second = candidate.bytes / seconds / 1e9
        row.of_copy = candidate.bytes / seconds / ceilings.copy
    if candidate.flops:
        row.tflops = candidate.flops / seconds / 1e12
        row.of_product = candidate.flops / seconds / getattr(ceilings, product)


def ceilings(device: torch.device) -> Ceilings:
    """Measures the ceilings of this machine with torch's copy and matrix product: the best of nine runs each."""
    elements = 1 << (28 if device.type == "cuda" else 26)
    source, target = (huge_pages.zeros(elements, device=device) for _ in range(2))
    size = 8192 if device.type == "cuda" else 1536
    functions: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions[name] = partial(torch.mm, a, b)
    times = {name: min(t) / 1e3 for name, t in measure(functions, device, repeats=9).items()}
    flops = 2 * size**3
    return Ceilings(2 * 4 * elements / times["copy"], flops / times["fp32"], flops / times["bf16"])


def environment(device: torch.device, measured: Ceilings) -> dict[str, Any]:
    """Commit, date, device, versions and ceilings of a measurement."""
    cuda = device.type == "cuda"
    return {
        "commit": current_commit(abbreviated=True) or "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if cuda else cpu(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {"torch": str(torch.__version__)}
        | {name: package_version(name) for name in ("triton", "transformers", "torchjd", "numpy")},
        "ceilings": {
            "copy_GB_per_s": measured.copy / 1e9,
            "fp32_TFLOP_per_s": measured.fp32 / 1e12,
            "bf16_TFLOP_per_s": measured.bf16 / 1e12,
        },
    }


def cpu() -> str:
    """The CPU's name and the number of cores that this process may use."""
    return f"{processor()}, {cores()} cores"


def available_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(rows: Iterable[Row]) -> str:
    """The rows as text for the terminal."""
    lines = []
    previous = None
    for row in rows:
        if row.case != previous:
            lines.append(f"\n{row.suite}: {row.case}")
            previous = row.case
        if row.median is None:
            lines.append(f"  {row.name:<34} {row.note}")
            continue
        facts = [f"{row.median:10.3f} ms  ({row.p10:.3f} to {row.p90:.3f})"]
        if row.gigabytes_per_second is not None and row.of_copy is not None:
            facts.append(f"{row.gigabytes_per_second:7.1f} GB/s ({row.of_copy:4.0%} of a copy)")
        if row.tflops is not None and row.of_product is not None:
            facts.append(f"{row.tflops:7.2f} TFLOP/s ({row.of_product:4.0%})")
        if row.tokens_per_second is not None:
            facts.append(f"{row.tokens_per_second:9,.0f} tokens/s  {row.working_megabytes or 0:6.0f} MB")
        facts += [f"{x:.2f}x {other}" for other, x in row.speedup.items()]
        lines.append(f"  {row.name:<34} {'  '.join(facts)}{'  ' + row.note if row.note else ''}")
    return "\n".join(lines)


def report(device: torch.device, measured: Ceilings, rows: list[Row]) -> dict[str, Any]:
    """The measurement as one JSON object; numbers have five significant digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return [rounded(v) for v in value] if isinstance(value, list) else value

    result: dict[str, Any] = rounded({**environment(device, measured), "rows": [asdict(row) for row in rows]})
    return result


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """A report as a file, a row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({**result, "rows": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    path.write_text(f"{head}[\n  {rows}\n ]\n}}\n", encoding="utf-8")
