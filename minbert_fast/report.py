# SPDX-License-Identifier: Apache-2.0
"""Rewrites the report of a training run or of a search from its files, or compares several runs on one page.

python -m minbert_fast.report runs/first                       writes runs/first/report.html and runs/first/plots/
python -m minbert_fast.report runs/search                      the same for a search: scores against the searched values
python -m minbert_fast.report runs/first runs/second           writes comparison.html
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minbert_fast.common.cli import Parser, run
from minbert_fast.common.schema import ConfigError
from minbert_fast.reporting.comparison import write_comparison
from minbert_fast.reporting.report import write_report
from minbert_fast.reporting.search_page import holds_search, write_search


def parser() -> argparse.ArgumentParser:
    flags = Parser("report", __doc__ or "")
    flags.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="--output of a run or a search")
    flags.add_argument("--output", type=Path, metavar="FILE", help="the comparison page (default: comparison.html)")
    return flags


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    if len(options.directories) == 1:
        if options.output is not None:
            raise ConfigError("--output is for comparisons; the report of one run goes into its own directory")
        (directory,) = options.directories
        print(write_search(directory) if holds_search(directory) else write_report(directory))
    else:
        print(write_comparison(options.directories, options.output or Path("comparison.html")))


if __name__ == "__main__":
    sys.exit(run(main))
