# SPDX-License-Identifier: Apache-2.0
"""A training run: its job, stages and loop; checkpoints, records, progress, trackers and signals."""
