# SPDX-License-Identifier: Apache-2.0
"""Times settings of the kernels' launch tables: tiles, warps, stages, programs a multiprocessor (a CUDA device).

    python -m benchmarks.launches [--only attention ...] [--json FILE]

The tables in `kernels/` hold what was fastest on an H100, or what the compiler's figures suggest. To choose again on another
chip, compare the times that this prints: microseconds of each setting at the sizes of a training step (2,770 tokens in 2,816
rows, three tasks, bf16), with a warm cache. Compiling takes most of its time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import device_time
from minbert_fast.common.provenance import current_commit, package_version
from minbert_fast.common.storage import write_text
from minbert_fast.kernels import add_norm, attention, bias_gelu, linear
from minbert_fast.kernels.column_sums import Partition
from minbert_fast.kernels.layer_norm import RowTile

ROWS, TOKENS, TASKS, SENTENCES, P = 2816, 2770, 3, 160, 0.1
#: Hidden size, inner size, layers, heads.
SHAPES = {"BERT-base": (768, 3072, 12, 12), "MiniLM-L6": (384, 1536, 6, 12)}


@dataclass(frozen=True)
class Variant:
    """A setting of a kernel at one model's sizes: what it replaces in the kernel's module, and what is timed then."""

    kernel: str
    shape: str
    setting: str
    module: ModuleType
    replaced: dict[str, Any]
    make: Callable[[], Callable[[], object]]  # called with everything replaced

    def call(self, take: Callable[[Callable[[], object]], Any]) -> Any:
        """Calls `take` with the function to be timed, under the setting, and returns its result."""
        with ExitStack() as stack:
            for name, value in self.replaced.items():
                stack.enter_context(mock.patch.object(self.module, name, value))
            return take(self.make())


class Inputs:
    """Random inputs of one model's kernels."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.width, self.inner, self.layers, self.heads = SHAPES[shape]
        ends = [0, TOKENS // 4, TOKENS // 2, TOKENS]
        self.bounds = torch.tensor(ends, dtype=torch.int32, device=device)
        self.seed = torch.ones(1, dtype=torch.int64, device=device)

    def matrix(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

    def vector(self, size: int) -> Tensor:
        return torch.rand(size, device=self.device)


def weight_gradients(it: Inputs) -> Iterator[Variant]:
    """All of a model's weight gradients in one launch, with their Gram matrix."""
    sizes = [(3 * it.width, it.width), (it.width, it.width), (it.inner, it.width), (it.width, it.inner)] * it.layers
    problems = [linear.Problem(it.matrix(ROWS, o), it.matrix(ROWS, i), it.matrix(TASKS, o, i), None) for o, i in sizes]

    def make() -> Callable[[], object]:
        rows, tiles = linear.table(problems)
        where = torch.tensor(rows, dtype=torch.int64, device=it.device)
        partials = linear.partial_grams(TASKS, it.device)
        return lambda: linear.weight_gradients(problems, where, tiles, it.bounds, partials, add=False)

    wide = [(o, i, 8, 1) for o, i in ((128, 256), (256, 128))]
    narrow = [(128, i, warps, programs) for i in (64, 128) for warps in (4, 8) for programs in (1, 2)]
    for (o, i, warps, programs), stages, parts in itertools.product(wide + narrow, (3, 4), (96, 192)):
        tile = linear.Tile(o, i, 64, warps, stages)
        replaced = {"grouped_tile": lambda *_, tile=tile: tile, "RESIDENT": programs, "PARTS": parts}
        name = f"{o} x {i}, {warps} warps, {stages} stages, {programs} a multiprocessor, {parts} rows of parts"
        yield Variant("weight_gradients", it.shape, name, linear, replaced, make)


def gelu(it: Inputs) -> Iterator[Variant]:
    x, dy, dx = (it.matrix(ROWS, it.inner) for _ in range(3))
    bias = it.vector(it.inner)

    def make() -> Callable[[], object]:
        parts = bias_gelu.partition(ROWS, it.inner, it.device)
        partials = parts.partials(TASKS, 1, it.inner, it.device)
        return lambda: bias_gelu.bias_gelu_unfinished(dy, x, bias, it.bounds, dx, partials)

    for columns, programs in itertools.product((128, 256), (2, 4, 6, 8)):
        replaced = {"BACKWARD_COLUMNS": columns, "RESIDENT": programs}
        name = f"{columns} columns, {programs} a multiprocessor"
        yield Variant("bias_gelu backward", it.shape, name, bias_gelu, replaced, make)


def norm(it: Inputs) -> Iterator[Variant]:
    x, residual, dy, more, y, dresidual = (it.matrix(ROWS, it.width) for _ in range(6))
    bias, gamma, beta = (it.vector(it.width) for _ in range(3))
    mean, rstd = it.vector(ROWS), it.vector(ROWS)

    def forward() -> Callable[[], object]:
        rest = (gamma, beta, 1e-12, P, it.seed, 1, y, mean, rstd)
        return lambda: add_norm.add_norm_forward(x, bias, residual, *rest)

    def backward() -> Callable[[], object]:
        partials = add_norm.partition(ROWS, it.width, it.device).partials(TASKS, 3, it.width, it.device)
        saved = (x, bias, residual, gamma, mean, rstd, it.bounds, P, it.seed, 1, y, dresidual, partials)
        return lambda: add_norm.add_norm_unfinished(dy, more, *saved)

    block = RowTile.of(it.width).block
    for rows, warps in itertools.product((1, 2, 4), (1, 2, 4)):
        tile = RowTile(block, rows, warps)
        name = f"{rows} rows, {warps} warps"
        row_tile = mock.Mock(of=lambda width, tile=tile: tile)
        yield Variant("add_norm forward", it.shape, name, add_norm, {"RowTile": row_tile}, forward)
        for parts in dict.fromkeys(Partition.among(ROWS, rows, programs * 132) for programs in (2, 3, 4)):
            replaced = {
                "_backward_tile": lambda width, tile=tile: tile,
                "partition": lambda rows, width, device, parts=parts: parts,
            }
            label = f"{name}, {parts.programs} programs"
            yield Variant("add_norm backward", it.shape, label, add_norm, replaced, backward)


def attend(it: Inputs) -> Iterator[Variant]:
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.randn(SENTENCES, generator=generator) * 7 + 17).clamp(4, 32).int()
    head = it.width // it.heads
    for longest in (32, 64, 128):
        lengths[0] = longest
        offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
        rows = int(offsets[-1])
        qkv, out, dout = it.matrix(rows, 3, it.heads, head), it.matrix(rows, it.width), it.matrix(rows, it.width)
        lse, dqkv, offsets = torch.empty(it.heads, rows, device=it.device), torch.empty_like(qkv), offsets.to(it.device)
        rest = (offsets, None, longest, head**-0.5, P, it.seed, 1)

        def forward() -> Callable[[], object]:
            return lambda: attention.attention_forward(qkv, *rest, out, lse)  # noqa: B023  # called before the next turn

        def backward() -> Callable[[], object]:
            return lambda: attention.attention_backward(dout, qkv, out, lse, *rest, dqkv)  # noqa: B023

        table = attention._table(qkv)
        size = attention._short_tiles(table, longest)[0] - 1
        for warps in (1, 2, 4, 8):
            other = replace(table, short=(*table.short[:size], (warps, warps), *table.short[size + 1 :]))
            replaced = {"_table": lambda qkv, other=other: other}
            name = f"to {longest} tokens, {warps} warps"
            yield Variant("attention forward", it.shape, name, attention, replaced, forward)
            yield Variant("attention backward", it.shape, name, attention, replaced, backward)


SWEEPS = {"weight_gradients": weight_gradients, "bias_gelu": gelu, "add_norm": norm, "attention": attend}


def variants(device: torch.device, only: Sequence[str] = ()) -> Iterator[Variant]:
    """All settings, of all kernels or of those named in `only`. Each must be called before the next is asked for."""
    for shape in SHAPES:
        it = Inputs(shape, device)
        for name, sweep in SWEEPS.items():
            if not only or name in only:
                yield from sweep(it)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=[], help="kernels (all)")
    parser.add_argument("--json", type=Path, help="also write the times to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    device = torch.device("cuda")
    rows: list[dict[str, Any]] = []
    report = {
        "commit": current_commit(abbreviated=True) or "unknown",
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": package_version("triton")},
        "note": "microseconds of one call, warm cache, medians of 20",
        "rows": rows,
    }
    with torch.cuda.stream(torch.cuda.Stream()):
        for variant in variants(device, options.only):
            row: dict[str, Any] = {"kernel": variant.kernel, "shape": variant.shape, "setting": variant.setting}
            try:
                times = variant.call(lambda run: device_time.measure({"": run}, device, cold=False, repeats=20)[""])
                row["microseconds"] = round(1e3 * statistics.median(times), 2)
            except Exception as error:  # too much shared memory, say: the others go on
                row["failure"] = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
            rows.append(row)
            print(*row.values(), sep=" | ", flush=True)
            if options.json:
                write_text(options.json, json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
