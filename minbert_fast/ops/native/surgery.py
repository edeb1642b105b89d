# SPDX-License-Identifier: Apache-2.0
"""Calls of the extension's surgery ops (gram, combine, adamw, weights), and the checks of tensors that must come first.

The extension reads and writes these tensors through plain addresses. The checks keep it inside the tensors' memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minbert_fast import _C

MAX_TASKS = _C.max_tasks

#: Each dtype's code in csrc/dtype.h.
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> None:
    """ValueError unless `tensor` is contiguous and has this shape (None: any size), dtype and device (None: any)."""
    _check(name, tensor, shape, (dtype,), device)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, but its strides are {list(tensor.stride())}")


def _check(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device | None
) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, not {tensor.layout}")
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(want is not None and want != size for want, size in zip(shape, got, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(got)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(_short, dtypes))}, not {_short(tensor.dtype)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not {tensor.device}")


def check_tasks(tasks: int) -> None:
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"there must be 1 to {MAX_TASKS} tasks, not {tasks}")


def check_gradients(J: Tensor, ndim: int = 2) -> None:
    """ValueError unless J [T, ...] is fp32 or bf16, T is 1 to 64, and its rows are contiguous without overlap."""
    _check("J", J, [None] * ndim, tuple(_DTYPE_CODES), None)
    check_tasks(J.shape[0])
    if not J[0].is_contiguous():
        raise ValueError(f"each row of J must be contiguous, but its strides are {list(J.stride())}")
    if _row_stride(J) < J[0].numel():
        raise ValueError(f"the rows of J must not overlap, but its strides are {list(J.stride())}")


def distinct(**tensors: Tensor | None) -> None:
    """ValueError if two of the tensors share memory: outputs must not overlap each other or an input."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _extent(t) * t.element_size(), name)
        for name, t in tensors.items()
        if t is not None and t.numel() and not t.is_meta  # which has no memory
    )
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{first} and {second} must not share memory")


def _extent(tensor: Tensor) -> int:
    """Elements from the first to just past the last of a non-empty strided tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _row_stride(J: Tensor) -> int:
    """Elements from one row to the next; for one row, its own length (at least 1)."""
    return J.stride(0) if J.shape[0] > 1 else max(J[0].numel(), 1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def matrix(J: Tensor) -> _C.Matrix:
    """J [T, ...] for the extension, which sees [T, columns]."""
    return _C.Matrix(J.data_ptr(), _DTYPE_CODES[J.dtype], J.shape[0], J[0].numel(), _row_stride(J))


def adamw_struct(step: tuple[Any, ...]) -> _C.AdamW:
    """An AdamWStep for the extension: its fields after J and w, then the number of parameters, in all and in a row."""
    p, row_slot = step[2], step[7]
    return _C.AdamW(*map(_address, step[2:]), p.numel(), p.numel() if row_slot is None else p.shape[1])


def _address(argument: Any) -> Any:
    """A tensor's address, 0 for None, anything else itself."""
    return 0 if argument is None else argument.data_ptr() if isinstance(argument, Tensor) else argument


def call(name: str, on: Tensor, *arguments: Any) -> Any:
    """Calls the extension's `name` on the device of `on`, the current one: on torch's number of threads or its stream.

    The caller has checked every tensor.
    """
    if on.is_cuda:
        name = f"cuda_{name}"
        where = _C.Where(on.device.index, torch.cuda.current_stream(on.device).cuda_stream, 0)
    else:
        where = _C.Where(-1, 0, torch.get_num_threads())
    return getattr(_C, name)(where, *map(_address, arguments))
