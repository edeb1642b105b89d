# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m benchmarks.run SUITE|all [--device D] [--json FILE]`.

Prints a table as it measures, and as its last line one JSON object (which --json writes): commit, device, versions, the
machine's measured ceilings, and one row per candidate. Exit status 1 if a candidate failed or computed a wrong result.
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

#: Modules of this folder with a function `run(device, ceilings) -> Iterable[harness.Row]`.
SUITES = ("kernels", "surgery", "any_model", "step", "encode", "encode_onnx", "dropin", "compiled")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
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
            if options.json:  # after every row: an interrupted run keeps its results
                harness.write_json(options.json, harness.report(device, measured, rows))
    print(json.dumps(harness.report(device, measured, rows)))
    return int(any(row.note.startswith(("WRONG", "FAILED")) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
