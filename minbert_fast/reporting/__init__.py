# SPDX-License-Identifier: Apache-2.0
"""Reports of runs: HTML pages, charts, comparisons of runs, model cards."""
