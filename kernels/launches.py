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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

#: Takes a kernel, the grid and the arguments of a launch, instead of the launch.
Take = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True)
class Launch:
    """One call of a launcher at a real size, on meta tensors."""

    label: (
        str  # op, dtypes by their names in torch, and shape; unique in its file; of those alike the largest comes last
    )
    call: Callable[[], object]
    wide: bool = False  # on sm_90, tiles must arrive by asynchronous copies of 16 bytes, and leave by stores of 16
    needs: str = ""  # what the text of each of its kernels for sm_90 must hold
    spilled: int = 0  # bytes a thread that may be spilled, where that was measured to be the fastest


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def intercepted(target: GPUTarget, take: Take, device: object = 0) -> Iterator[None]:
    """Inside, launching a Triton kernel calls `take(kernel, grid, arguments, keywords)`, and launchers see `target`.

    Nothing runs, so tensors may be without storage. `device` names the device that Triton believes to be current.
    """
    driver, original = triton.runtime.driver, KernelInterface.__getitem__
    before = driver._active

    def launcher(kernel: Any, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: take(kernel, grid, args, kwargs)

    fake = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: device,  # Triton keeps compiled kernels by device
        get_current_stream=lambda device: 0,
    )
    driver._active = fake
    KernelInterface.__getitem__ = launcher
    try:
        yield
    finally:
        driver._active = before
        KernelInterface.__getitem__ = original
