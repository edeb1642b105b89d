# SPDX-License-Identifier: Apache-2.0
"""Where the time of a captured step goes: on the device by group of kernels, and on the host (a CUDA device).

    python -m benchmarks.step_profile [--json FILE]

Prints the rows of a model as soon as it is measured; the file holds every kernel as well. Times of kernels come from
torch.profiler, as means over replays on real or random sentences (benchmarks/batches.py). `benchmarks/traffic.py` counts the
same launches without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import batches
from benchmarks.gradients import CONFIGS
from benchmarks.step import BATCHES, GRAIN, make_model
from minbert_fast import BertConfig
from minbert_fast.common.provenance import current_commit, package_version
from minbert_fast.common.storage import write_text
from minbert_fast.step.captured import GraphedStep
from minbert_fast.step.one_pass import OnePassStep

REPLAYS = 8  # under the profiler
STEPS, REPEATS = 40, 5  # timed in a row, and how often

#: Groups in the order of the table, and parts of the names of their kernels; the first that fits takes a kernel.
GROUPS = {
    "weight gradients": ("_weight_gradients", "_linear_gradients", "_segment_gradients"),
    "column sums": ("_finish_many", "_finish_column_sums"),
    "Gram matrix": ("gram",),
    "AdamW, dense and rows": ("adamw",),
    "attention": ("short_forward", "short_backward", "tiled_"),
    "bias_gelu": ("_bias_gelu",),
    "add_norm": ("_add_norm",),
    "embedding": ("_embedding",),
    "surgery and bookkeeping": ("pcgrad", "clip_kernel", "_settle", "_row_slots"),
    "copies and fills": ("Memcpy", "Memset", "memcpy", "FillFunctor", "multi_tensor_apply"),
    "matrix products": ("nvjet", "gemm", "cutlass", "gemv", "splitK", "xmma"),
}
REST = "everything else"


def group_of(kernel: str) -> str:
    """The group of a kernel by its name."""
    return next((group for group, parts in GROUPS.items() if any(part in kernel for part in parts)), REST)


def grouped(kernels: Iterable[tuple[str, float, int]], replays: int) -> list[dict[str, Any]]:
    """Rows of microseconds and launches a step from (name, total microseconds, launches) of each kernel."""
    rows: dict[str, list[float]] = {group: [0.0, 0.0] for group in (*GROUPS, REST)}
    for name, microseconds, launches in kernels:
        row = rows[group_of(name)]
        row[0] += microseconds / replays
        row[1] += launches / replays
    return [
        {"kernels": group, "microseconds": round(microseconds, 1), "launches": round(launches, 1)}
        for group, (microseconds, launches) in rows.items()
        if launches
    ]


def measure(config: BertConfig, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one model, by time, and its times as a whole with every kernel."""
    model, recipe = make_model(config, 3, device)
    step = GraphedStep(OnePassStep(model, recipe, torch.bfloat16))
    longest = max(batch.packed.num_tokens for batch in batches.make_batches(model, BATCHES))
    capacity = -(-longest // GRAIN) * GRAIN
    fed = [batch.to(device) for batch in batches.make_batches(model, BATCHES, token_capacity=capacity)]
    for batch in fed * 2:  # compiles kernels, then captures
        step(batch, 1.0)
    turn = itertools.cycle(fed)
    many = [seconds(lambda: [step(next(turn), 1.0) for _ in range(STEPS)]) / STEPS for _ in range(REPEATS)]
    alone = [seconds(graph.replay, STEPS) / STEPS for graph in step.graphs() for _ in range(REPEATS)]
    calls = [seconds(lambda: step(next(turn), 1.0), wait=False) for _ in range(STEPS)]
    prepared = [seconds(lambda: step.step.prepare(fed[0], 1.0), wait=False) for _ in range(STEPS)]
    whole: dict[str, Any] = {
        "milliseconds in a row": round(1e3 * statistics.median(many), 3),
        "milliseconds of a replay": round(1e3 * statistics.median(alone), 3),
        "host, microseconds of a call": round(1e6 * statistics.median(calls), 1),
        "host, microseconds of prepare": round(1e6 * statistics.median(prepared), 1),
    }
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(REPLAYS):
            step(fed[i % len(fed)], 1.0)
        torch.cuda.synchronize()
    events = [(event.key, float(event.device_time_total), event.count) for event in profile.key_averages()]
    events.sort(key=lambda event: -event[1])
    whole["kernels"] = [[name[:150], round(us / REPLAYS, 1), count / REPLAYS] for name, us, count in events]
    return sorted(grouped(events, REPLAYS), key=lambda row: -row["microseconds"]), whole


def seconds(run: Callable[[], object], times: int = 1, wait: bool = True) -> float:
    """From an idle device until `run` has been called, and, with `wait`, until the device has finished."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    if wait:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_profile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    device = torch.device("cuda")
    report: dict[str, Any] = {
        "commit": current_commit(),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": package_version("triton")},
        "note": f"one captured step, 3 x 32 examples, PCGrad; torch.profiler, mean of {REPLAYS} replays; per step",
        "rows": [],
        "steps": {},
    }
    for shape, config in CONFIGS.items():
        rows, report["steps"][shape] = measure(config, device)
        for name, value in report["steps"][shape].items():
            if name != "kernels":
                print(f"{shape:10} {name}: {value}", flush=True)
        for row in rows:
            report["rows"].append({"shape": shape, **row})
            print(f"{shape:10} {row['kernels']:28} {row['microseconds']:9.1f} us {row['launches']:7.1f}", flush=True)
        if options.json:
            write_text(options.json, json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
