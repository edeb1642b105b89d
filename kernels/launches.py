# SPDX-License-Identifier: Apache-2.0
"""The calls that the ahead-of-time check compiles: calls of the launchers themselves, on tensors without storage.

Each file of kernels defines

    def launches() -> Iterator[Launch]:
        x = meta(2816, 768, dtype=torch.bfloat16)
        yield Launch("forward bfloat16 768", partial(add_norm_forward, x, ...))

with one entry for each row of its launch tables and each dtype that compiles differently. The check (ahead_of_time.py)
runs each call with Triton's launch replaced by compilation. So it compiles exactly what runs: the same argument types,
alignment, constants and number of warps. A launcher that reads a value from a device tensor could not be captured in a
CUDA graph. It fails in the check too, because a meta tensor has no values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One call of a launcher at a real size, on meta tensors."""

    label: str  # op, dtypes by their names in torch, and shape; unique in its file
    call: Callable[[], object]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")
