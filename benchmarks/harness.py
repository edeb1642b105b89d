# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: checked candidates, interleaved timing, the machine's own ceilings, rows of results.

A suite is a function `run(device) -> Iterable[Row]` (see benchmarks/run.py). It builds cases; each case is a set of
candidates that compute the same thing in different ways, timed in turns in one process, so that whatever else the
machine does falls on all of them alike. A candidate whose check fails, or that raises, is reported and not timed.
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

from minbert_fast.common import huge_pages, provenance

ROOT = Path(__file__).parents[1]


#: From the functions by name and the device to milliseconds of each.
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], dict[str, list[float]]]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case's result. `bytes` and `flops` count what it must move and do at the least."""

    run: Callable[[], object]
    check: Callable[[], object] | None = None  # raises AssertionError when the result is wrong
    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached just now: bytes/s read and written by a large copy, FLOP/s of a large product."""

    copy: float
    fp32: float
    bf16: float


@dataclass
class Row:
    """One candidate in one case. Times are in milliseconds."""

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
    of_product: float | None = None  # share of the fp32 (or bf16) product's rate
    tokens: int | None = None  # real ones, without padding
    tokens_per_second: float | None = None
    working_megabytes: float | None = None  # beyond what stays in memory from step to step
    speedup: dict[str, float] = field(default_factory=dict)  # over the case's baselines
    note: str = ""


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 15, seconds: float = 10.0
) -> dict[str, list[float]]:
    """Milliseconds of each function, in rounds: one call of each, over and over. One warm-up round is not counted.

    A function that has used up `seconds` sits out the further rounds, so a slow baseline costs no patience.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        warm = time_one(function, device)
        if warm > 1e3 * seconds:  # one run is all that there is time for
            times[name].append(warm)
    for _ in range(repeats):
        for name, function in functions.items():
            if sum(times[name]) < 1e3 * seconds:
                times[name].append(time_one(function, device))
    return times


def time_one(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, from an idle device to an idle device."""
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
    """Checks every candidate, times those that are right, and compares them with each of `baselines`.

    `timer` is `measure`, or what takes its place where a host's clock is too coarse.
    """
    rows = {key: Row(suite, name, key) for key in candidates}
    for key, candidate in candidates.items():
        try:
            (candidate.check or candidate.run)()
        except AssertionError as error:
            rows[key].note = f"WRONG RESULT, not timed: {_first_line(error)}"
        except Exception as error:  # another library's candidate must not end a suite of ours
            rows[key].note = f"FAILED, not timed: {type(error).__name__}: {_first_line(error)}"
    sound = {key: c.run for key, c in candidates.items() if not rows[key].note}
    for key, times in timer(sound, device).items():
        _fill(rows[key], candidates[key], times, ceilings, product)
    for row in rows.values():
        for baseline in baselines:
            other = rows[baseline].median
            if row.name != baseline and row.median and other:
                row.speedup[baseline] = round(other / row.median, 2)
    return list(rows.values())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


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
    """Measured now, on this machine, with torch's own copy and product."""
    elements = 1 << (28 if device.type == "cuda" else 26)
    source, target = (huge_pages.zeros(elements, device=device) for _ in range(2))
    size = 8192 if device.type == "cuda" else 1536
    functions: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions[name] = partial(torch.mm, a, b)
    times = {name: statistics.median(t) / 1e3 for name, t in measure(functions, device, repeats=9).items()}
    flops = 2 * size**3
    return Ceilings(2 * 4 * elements / times["copy"], flops / times["fp32"], flops / times["bf16"])


def environment(device: torch.device, measured: Ceilings) -> dict[str, Any]:
    """Where and with what the rows were measured."""
    cuda = device.type == "cuda"
    commit = provenance.current_commit()
    return {
        "commit": f"{commit[:12]}{commit[40:]}" if commit else "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {
            name: provenance.installed_version(name) for name in ("torch", "triton", "transformers", "torchjd", "numpy")
        },
        "ceilings": {
            "copy_GB_per_s": measured.copy / 1e9,
            "fp32_TFLOP_per_s": measured.fp32 / 1e12,
            "bf16_TFLOP_per_s": measured.bf16 / 1e12,
        },
    }


def processor() -> str:
    """The CPU's name and how many of its cores this process may use."""
    return f"{provenance.processor_name()}, {provenance.usable_cores()} cores"


def available_bytes(device: torch.device) -> int:
    """Memory that a case may fill: what is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(rows: Iterable[Row]) -> str:
    """Rows for a reader."""
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
    """Everything as one JSON object; figures to five significant places."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items()}
        return [rounded(v) for v in value] if isinstance(value, list) else value

    result: dict[str, Any] = rounded({**environment(device, measured), "rows": [asdict(row) for row in rows]})
    return result


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
