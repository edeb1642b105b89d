# SPDX-License-Identifier: Apache-2.0
"""Checks that stand between a tensor and a raw pointer: what passes here cannot make compiled code read astray."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

#: The codes of csrc/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

FLOATS = (torch.float32, torch.bfloat16)


def check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype | Sequence[torch.dtype] | None = FLOATS,
    device: torch.device | None = None,
) -> Tensor:
    """`tensor` itself, after making sure of its shape (None: any size), dtype (None: any) and device.

    Raises ValueError naming the argument, what was expected and what came.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, not {tensor.layout}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want is not None and want != size for want, size in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(got)}")
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype and tuple(dtype)
    if allowed and tensor.dtype not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(short, allowed))}, not {short(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not {tensor.device}")
    return tensor


def contiguous(name: str, tensor: Tensor) -> Tensor:
    """`tensor` itself if its elements lie densely in memory in their order; ValueError otherwise."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, but its strides are {list(tensor.stride())}")
    return tensor


def row_stride(name: str, tensor: Tensor) -> int:
    """Elements from one row of `tensor` [rows, ...] to the next; each row itself must be contiguous.

    Rows must not overlap (a stride of 0, or shorter than a row), unless there is only one. ValueError otherwise.
    """
    rows, size = tensor.shape[0], tensor.shape[1:].numel()
    if rows and not tensor[0].is_contiguous():
        raise ValueError(f"each row of {name} must be contiguous, but its strides are {list(tensor.stride())}")
    stride = tensor.stride(0) if rows > 1 else max(size, 1)
    if stride < size:
        raise ValueError(f"the rows of {name} must not overlap, but its strides are {list(tensor.stride())}")
    return stride


def distinct(**tensors: Tensor | None) -> None:
    """ValueError if two of the tensors share memory: outputs must not overlap each other or an input."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + extent(t) * t.element_size(), name)
        for name, t in tensors.items()
        if t is not None and t.numel()
    )
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{first} and {second} must not share memory")


def extent(tensor: Tensor) -> int:
    """Elements from the first to just past the last of a non-empty strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def pointer(tensor: Tensor | None) -> int:
    """The address for the extension; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def threads() -> int:
    """How many threads a CPU kernel may use: torch's own number, asked anew at each call."""
    return torch.get_num_threads()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
