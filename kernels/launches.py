# SPDX-License-Identifier: Apache-2.0
"""What the ahead-of-time check compiles: calls of the launchers themselves, on tensors without storage.

Each file of kernels defines

    def launches() -> Iterator[Launch]:
        x = torch.empty(2816, 768, dtype=torch.bfloat16, device="meta")
        yield Launch("forward bfloat16 768", partial(add_norm_forward, x, ...))

with one entry for each row of its launch tables and each dtype that compiles differently. The check (ahead_of_time.py)
runs each call with Triton's launch replaced by compilation, so what it compiles can never differ from what runs:
argument types, alignment, constants, number of warps. A launcher that asks a device tensor for a value, and so could
not be captured in a CUDA graph, fails there too: a meta tensor has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One call of a launcher at a real size, on meta tensors."""

    label: str  # op, dtypes by their names in torch, and shape; unique in its file
    call: Callable[[], object]
