# SPDX-License-Identifier: Apache-2.0
"""g [P] = w J, the tasks' gradients combined. J is read once: e T + 4 bytes a parameter (e bytes an element of J)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import cdiv
from minbert_fast.kernels.launches import Launch, meta

ELEMENTS, NUM_WARPS = 1024, 4  # a program's parameters: two 16-byte loads a thread from each fp32 row


@triton.jit
def combined(j_ptr, w_ptr, j_stride, offsets, mask, T: tl.constexpr):
    """sum_t w[t] J[t] at `offsets` (w None: J[0]), in the order of the tasks. Rows of weight 0 are not read."""
    gradient = tl.zeros(offsets.shape, tl.float32)
    for t in tl.static_range(T):
        if w_ptr is None:
            gradient += tl.load(j_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            weight = tl.broadcast_to(tl.load(w_ptr + t), offsets.shape)
            row = tl.load(j_ptr + offsets, mask=mask & (weight != 0.0), other=0.0).to(tl.float32)
            gradient = tl.fma(weight, row, gradient)
        j_ptr += j_stride
    return gradient


@triton.jit
def _combine(
    j_ptr,  # [T, count]
    w_ptr,  # [T] fp32
    out_ptr,  # [count] fp32
    j_stride, count,
    T: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = offsets < count
    tl.store(out_ptr + offsets, combined(j_ptr, w_ptr, j_stride, offsets, mask, T), mask=mask)


def combine(J: Tensor, w: Tensor, out: Tensor) -> None:
    """out [P] fp32 = w J, from J [T, P] (any task stride, fp32 or bf16) and w [T] fp32."""
    tasks, count = J.shape
    if count:
        _combine[(cdiv(count, ELEMENTS),)](
            J, w, out, J.stride(0), count, T=tasks, ELEMENTS=ELEMENTS, num_warps=NUM_WARPS, enable_fp_fusion=False
        )


def launches() -> Iterator[Launch]:
    """Few and many tasks, fp32 and bf16 J, for the ahead-of-time check."""
    for tasks, dtype in ((3, torch.float32), (3, torch.bfloat16), (64, torch.float32)):
        J, w, out = meta(tasks, 1 << 20, dtype=dtype), meta(tasks), meta(1 << 20)
        yield Launch(f"{tasks} tasks {str(dtype)[6:]}", partial(combine, J, w, out))
