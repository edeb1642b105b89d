# SPDX-License-Identifier: Apache-2.0
"""The cosine of each row of two matrices, and its gradients: a program a row, one launch in each direction."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from minbert_fast.kernels.arguments import next_power_of_2
from minbert_fast.kernels.launches import Launch, meta


@triton.jit
def _cosine_forward(
    u_ptr,  # [rows, WIDTH]
    v_ptr,  # [rows, WIDTH]
    cosine_ptr,  # [rows]
    norms_ptr,  # [rows, 2] fp32
    eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    uu = tl.zeros((BLOCK,), tl.float32)
    vv = tl.zeros((BLOCK,), tl.float32)
    uv = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        u = tl.load(u_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        uu += u * u
        vv += v * v
        uv += u * v
    u_norm = tl.sqrt(tl.sum(uu, 0))
    v_norm = tl.sqrt(tl.sum(vv, 0))
    cosine = tl.sum(uv, 0) / tl.maximum(u_norm, eps) / tl.maximum(v_norm, eps)
    tl.store(cosine_ptr + row, cosine.to(cosine_ptr.dtype.element_ty))
    tl.store(norms_ptr + row * 2, u_norm)
    tl.store(norms_ptr + row * 2 + 1, v_norm)


@triton.jit
def _cosine_backward(
    dcosine_ptr,  # [rows]
    u_ptr,  # [rows, WIDTH]
    v_ptr,  # [rows, WIDTH]
    cosine_ptr,  # [rows]
    norms_ptr,  # [rows, 2] fp32
    du_ptr,  # [rows, WIDTH]
    dv_ptr,  # [rows, WIDTH]
    eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dcosine = tl.load(dcosine_ptr + row).to(tl.float32)
    along = dcosine * tl.load(cosine_ptr + row).to(tl.float32)
    u_norm = tl.load(norms_ptr + row * 2)
    v_norm = tl.load(norms_ptr + row * 2 + 1)
    across = dcosine / tl.maximum(u_norm, eps) / tl.maximum(v_norm, eps)
    u_along = along / tl.maximum(u_norm, eps) / tl.where(u_norm > 0.0, u_norm, 1.0)
    v_along = along / tl.maximum(v_norm, eps) / tl.where(v_norm > 0.0, v_norm, 1.0)
    for first in range(0, WIDTH, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < WIDTH
        u = tl.load(u_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        du = across * v - u_along * u
        dv = across * u - v_along * v
        tl.store(du_ptr + row * WIDTH + columns, du.to(du_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + row * WIDTH + columns, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def _launch(width: int) -> dict[str, object]:
    return {"WIDTH": width, "BLOCK": min(1024, next_power_of_2(width)), "num_warps": 4, "enable_fp_fusion": True}


def cosine_forward(u: Tensor, v: Tensor, eps: float, cosine: Tensor, norms: Tensor) -> None:
    """u, v [n, D] -> cosine [n], and the lengths of their rows, norms [n, 2] fp32."""
    rows, width = u.shape
    if rows:
        _cosine_forward[(rows,)](u, v, cosine, norms, eps, **_launch(width))


def cosine_backward(
    dcosine: Tensor, u: Tensor, v: Tensor, cosine: Tensor, norms: Tensor, eps: float, du: Tensor, dv: Tensor
) -> None:
    """dcosine [n] -> du, dv [n, D]."""
    rows, width = u.shape
    if rows:
        _cosine_backward[(rows,)](dcosine, u, v, cosine, norms, du, dv, eps, **_launch(width))


def launches() -> Iterator[Launch]:
    """Each dtype, one block and several, for the ahead-of-time check."""
    for dtype, width in [(torch.float32, 100), (torch.float32, 768), (torch.float32, 4096), (torch.bfloat16, 768)]:
        u, cosine, norms = meta(32, width, dtype=dtype), meta(32, dtype=dtype), meta(32, 2)
        label = f"{str(dtype)[6:]} {width}"
        yield Launch(f"forward {label}", partial(cosine_forward, u, u, 1e-8, cosine, norms))
        yield Launch(f"backward {label}", partial(cosine_backward, cosine, u, u, cosine, norms, 1e-8, u, u))
