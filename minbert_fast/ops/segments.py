# SPDX-License-Identifier: Apache-2.0
"""Small helpers that the ops of this folder share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def segments(bounds: Tensor) -> list[tuple[int, int]]:
    """Row ranges of the tasks, on the host: for the PyTorch path alone, since it asks a device for values."""
    return list(itertools.pairwise(bounds.tolist()))


def one_segment(rows: int, device: torch.device) -> Tensor:
    """Bounds [0, rows] of a single task, made on the device without a copy from the host."""
    return torch.arange(2, dtype=torch.int32, device=device) * rows


def anchor(device: torch.device) -> Tensor:
    """An empty tensor that requires grad: an op that takes it runs its backward though no other input requires grad."""
    return torch.empty(0, device=device, requires_grad=True)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the PyTorch path computes in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
