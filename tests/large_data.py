# SPDX-License-Identifier: Apache-2.0
"""Trains on a generated file of millions of rows: time and memory of building the token cache, of steps, of a rebuild.

    python -m tests.large_data [--rows 10000000] [--longest 20] [--folder DIR] [--steps 3]

Each part is a run of `minbert_fast.train` in a separate process; this process measures its memory. Prints one JSON line
per part: seconds, and the peak of the process's own memory (RssAnon: without pages of mapped files, which the kernel can
free at any time). A run with the sample data and the same settings gives the memory that any run needs.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minbert_fast.data import sample_directory

HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
BLOCK = 10_000  # rows per write


def write_rows(path: Path, rows: int, longest: int = 20, seed: int = 0) -> None:
    """Writes a paraphrase file of sentences of 1 to `longest` words from the sample model's vocabulary."""
    words = [w for w in (sample_directory().model / "vocab.txt").read_text().split() if w.isalpha()]
    draw = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        file.write(HEADER)
        for begin in range(0, rows, BLOCK):
            count = min(BLOCK, rows - begin)
            lengths = draw.integers(1, longest + 1, (count, 2))
            text = iter([words[index] for index in draw.integers(0, len(words), lengths.sum())])
            labels = draw.integers(0, 2, count)
            file.writelines(
                f"{row}\t{row:08x}\t{' '.join(islice(text, a))}\t{' '.join(islice(text, b))}\t{label}.0\n"
                for row, (a, b), label in zip(range(begin, begin + count), lengths.tolist(), labels, strict=True)
            )


def used_seconds() -> float:
    """CPU seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def watched(arguments: list[str]) -> dict[str, Any]:
    """Runs training to its end; returns wall seconds, CPU seconds and peak memory in MiB."""
    began, before = time.monotonic(), used_seconds()
    process = subprocess.Popen(
        [sys.executable, "-m", "minbert_fast.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peaks = {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for name, value in re.findall(r"^(RssAnon|RssFile|VmHWM):\s+(\d+) kB", status.read_text(), re.MULTILINE):
            peaks[name] = max(peaks[name], int(value))
        time.sleep(0.02)
    assert process.stdout is not None
    said = process.stdout.read()
    process.stdout.close()
    assert process.returncode == 0, said
    seconds = {"seconds": time.monotonic() - began, "cpu_seconds": used_seconds() - before}
    return {
        **{name: round(value, 1) for name, value in seconds.items()},
        **{name: round(peak / 1024) for name, peak in peaks.items()},
    }


def measure(folder: Path, rows: int, longest: int, steps: int) -> None:
    """Runs all parts on a file of `rows` rows in `folder`, which needs about 250 bytes per row."""
    source, cache = folder / "rows.csv", folder / "cache"
    flags = ["--device", "cpu", "--max-steps", str(steps), "--set", f"data.cache={cache}"]

    def train(name: str, *more: str) -> None:
        print(json.dumps({name: watched([*flags, "--output", str(folder / name), *more])}), flush=True)

    train("sample")
    began = time.monotonic()
    write_rows(source, rows, longest)
    written = {"rows": rows, "bytes": source.stat().st_size, "seconds": round(time.monotonic() - began, 1)}
    print(json.dumps({"written": written}), flush=True)
    data = ["--recipe", "demonstration", "--set", f"data.files.paraphrase.train='{source}'"]
    train("built", *data)
    train("reused", *data)
    print(json.dumps({"cache": {"bytes": sum(path.stat().st_size for path in cache.glob("rows-*/*"))}}), flush=True)
    with source.open("a") as file:
        file.write(f"{rows}\tlast\tone more\trow\t1.0\n")
    train("rebuilt", *data)
    assert len(list(cache.glob("rows-*"))) == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--longest", type=int, default=20, help="words of a sentence; 1 to this many")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="a place with room; default: a temporary folder, removed afterwards"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options.rows, options.longest, options.steps)


if __name__ == "__main__":
    main()
