# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: every number is measured together with its baseline, in the same process."""
