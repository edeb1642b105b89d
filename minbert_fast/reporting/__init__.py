# SPDX-License-Identifier: Apache-2.0
"""What a reader sees of runs: pages, charts, comparisons, model cards."""
