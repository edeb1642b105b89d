# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m benchmarks.run {kernels,surgery,step,encode,all} [--device D] [--json FILE]`.

Prints a table while it goes, and as its last line one JSON object (what --json writes): commit, device, versions, the
machine's measured ceilings, and a row for each candidate. Exit status 1 when a candidate computed something wrong or failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness

#: Each is a module of this folder with `run(device, ceilings) -> Iterable[harness.Row]`.
SUITES = ("kernels", "surgery", "step", "encode")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: no CUDA device here")
    device = torch.device(options.device)
    suites = SUITES if options.suite == "all" else (options.suite,)
    measured = harness.ceilings(device)
    rows: list[harness.Row] = []
    for suite in suites:
        for row in importlib.import_module(f"benchmarks.{suite}").run(device, measured):
            new_case = not rows or (rows[-1].suite, rows[-1].case) != (row.suite, row.case)
            text = harness.table([row]).lstrip("\n").split("\n")
            print("\n".join(["", *text] if new_case else text[1:]), flush=True)
            rows.append(row)
            if options.json:  # whatever ends a long run, what it has measured is kept
                harness.write_json(options.json, harness.report(device, measured, rows))
    print(json.dumps(harness.report(device, measured, rows)))
    return int(any(row.note.startswith(("WRONG", "FAILED")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
