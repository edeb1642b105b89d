# SPDX-License-Identifier: Apache-2.0
"""Properties of the device that launchers choose their settings by."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

#: Triton's names of the dtypes, for kernels whose pointers come from a table.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`. Triton's function of this name costs the host 2 us a call, as the next one does."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The least power of 2 that is not below `size`, which is 1 or more."""
    return 1 << (size - 1).bit_length()


@functools.cache
def _multiprocessors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H100's for meta tensors; 4 for a CPU (the interpreter: few, yet more than one)."""
    if device.type == "meta":
        return 132
    if device.type != "cuda":
        return 4
    return _multiprocessors(torch.cuda.current_device() if device.index is None else device.index)


def is_hopper_or_newer(device: torch.device) -> bool:
    """Whether kernels for `device` compile for an NVIDIA chip of compute capability 9.0 or above.

    A meta tensor on a machine without a GPU counts as one on an H100.
    """
    if device.type == "cpu":
        return False
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:
        if device.type == "meta":
            return True
        raise
    return target.backend == "cuda" and target.arch >= 90


def all_registers(device: torch.device, warps: int) -> dict[str, int]:
    """A launch's `maxnreg`: the most registers that a thread can have in a program of `warps` warps.

    By default the NVIDIA assembler may spill a few bytes to fit one more program on a multiprocessor.
    """
    if device.type == "cpu" or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": min(255, 65536 // (32 * warps))}
