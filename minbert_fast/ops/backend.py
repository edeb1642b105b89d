# SPDX-License-Identifier: Apache-2.0
"""The one module that decides which implementation of an op runs, with the one override that tests use."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from minbert_fast.ops import native

Implementation = Literal["triton", "native", "torch"]

_TRITON = importlib.util.find_spec("triton") is not None
_forced: Implementation | None = None


def triton_available() -> bool:
    """Whether Triton is installed (CUDA builds of torch bring it on Linux); this imports nothing."""
    return _TRITON


def implementation(tensor: Tensor) -> Implementation:
    """The implementation for tensors like this one: Triton on a GPU, the C++ extension on a CPU, else PyTorch.

    PyTorch for fp64 on any device and for fp16 on a CPU: the others do not support them. A meta tensor, on which ops are
    only traced, counts as one on a GPU.
    """
    if _forced is not None:
        return _forced
    if tensor.dtype == torch.float64:
        return "torch"
    if tensor.device.type == "cpu":
        return "torch" if tensor.dtype == torch.float16 else "native"
    if tensor.device.type == "meta" or (tensor.device.type == "cuda" and triton_available()):
        return "triton"
    return "torch"


def surgery_implementation(tensor: Tensor) -> Implementation:
    """The same for surgery's ops and AdamW. An extension built with CUDA has them for a GPU too."""
    if tensor.is_cuda and native.HAS_CUDA and _forced is None:
        return "native"
    return implementation(tensor)


@contextmanager
def force(choice: Implementation) -> Iterator[None]:
    """Runs every op inside the block, in every thread, by one implementation (for tests and benchmarks)."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def drops_padding(tensor: Tensor) -> bool:
    """Whether to pack rectangular input first: on a CPU, unless torch.compile needs static shapes."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
