# SPDX-License-Identifier: Apache-2.0
"""The one module that decides which implementation of an op runs, with the one override that tests use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from minbert_fast.ops import native

Implementation = Literal["triton", "native", "torch"]

_forced: ContextVar[Implementation | None] = ContextVar("forced implementation", default=None)


@functools.cache
def triton_available() -> bool:
    """Whether Triton can be imported (it is a Linux package)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def implementation(tensor: Tensor) -> Implementation:
    """The implementation for tensors like this one: Triton on a GPU, the C++ extension on a CPU, else PyTorch.

    PyTorch for fp64 anywhere, and for fp16 on a CPU: the others know none.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    if tensor.dtype == torch.float64:
        return "torch"
    if tensor.device.type == "cpu":
        return "torch" if tensor.dtype == torch.float16 else "native"
    if tensor.device.type == "cuda" and triton_available():
        return "triton"
    return "torch"


def surgery_implementation(tensor: Tensor) -> Implementation:
    """The same for surgery's ops and AdamW, which the extension has for a GPU too, if it was built with CUDA."""
    if tensor.is_cuda and native.HAS_CUDA and _forced.get() is None:
        return "native"
    return implementation(tensor)


@contextmanager
def force(choice: Implementation) -> Iterator[None]:
    """Runs every op inside the block by one implementation (tests: the interpreter on CPU tensors, the reference)."""
    token = _forced.set(choice)
    try:
        yield
    finally:
        _forced.reset(token)


def drops_padding(tensor: Tensor) -> bool:
    """Whether rectangular input is worth packing first: on a CPU yes, but never where shapes must stay static."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
