# SPDX-License-Identifier: Apache-2.0
"""Calls of the extension's surgery ops (gram, combine, adamw, weights) on CPU and CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minbert_fast import _C
from minbert_fast.ops.native.tensors import DTYPE_CODES, check, row_stride, threads

MAX_TASKS = _C.max_tasks


def check_tasks(tasks: int) -> None:
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"there must be 1 to {MAX_TASKS} tasks, not {tasks}")


def check_gradients(J: Tensor, ndim: int = 2) -> None:
    """ValueError unless J [T, ...] is fp32 or bf16 with contiguous rows, any distance apart, and T is 1 to 64."""
    check("J", J, [None] * ndim, (torch.float32, torch.bfloat16))
    check_tasks(J.shape[0])
    row_stride("J", J)


def matrix(J: Tensor) -> _C.Matrix:
    """J [T, ...] for the extension, which sees [T, columns]."""
    return _C.Matrix(J.data_ptr(), DTYPE_CODES[J.dtype], J.shape[0], J.shape[1:].numel(), row_stride("J", J))


def adamw_struct(step: tuple[Any, ...]) -> _C.AdamW:
    """An AdamWStep for the extension: its fields after J and w, then the number of parameters, in all and in a row."""
    p, row_slot = step[2], step[7]
    return _C.AdamW(*map(address, step[2:]), p.numel(), p.numel() if row_slot is None else p.shape[1])


def address(argument: Any) -> Any:
    """A tensor's address, 0 for None, anything else itself."""
    return 0 if argument is None else argument.data_ptr() if isinstance(argument, Tensor) else argument


def call(name: str, on: Tensor, *arguments: Any) -> Any:
    """Calls the extension's `name` on the device of `on`, the current one: on torch's number of threads or its stream.

    The extension reads and writes through plain addresses: the caller has checked every tensor.
    """
    if on.is_cuda:
        name = f"cuda_{name}"
        where = _C.Where(on.device.index, torch.cuda.current_stream(on.device).cuda_stream, 0)
    else:
        where = _C.Where(-1, 0, threads())
    return getattr(_C, name)(where, *map(address, arguments))
