# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: every number beside its baseline, measured in the same process."""
