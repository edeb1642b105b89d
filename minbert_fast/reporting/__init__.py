# SPDX-License-Identifier: Apache-2.0
"""Reports of runs: verdicts and next steps, HTML pages, charts, comparisons, searches, model cards."""
