# SPDX-License-Identifier: Apache-2.0
"""The cosine of each row of u with the same row of v. Triton's kernels on a GPU, else PyTorch.

Shapes: n rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import kernel_op

EPS = 1e-8  # the least length that a row is divided by


def reference(u: Tensor, v: Tensor) -> Tensor:
    """The op in plain PyTorch. Its gradient ignores that lengths below EPS are constants, and is 0 for a length of 0."""
    return F.cosine_similarity(u, v, dim=-1, eps=EPS)


def cosine(u: Tensor, v: Tensor) -> Tensor:
    """Cosine similarity of rows, [n, D] x [n, D] -> [n]; a zero row gives 0 and a finite gradient.

    On a GPU differentiable once in both. Shapes that broadcast are PyTorch's.
    """
    if implementation(u) != "triton" or u.dim() != 2 or (u.shape, u.dtype) != (v.shape, v.dtype):
        return reference(u, v)
    found: Tensor = _Cosine.apply(u, v)
    return found


def normalize(x: Tensor) -> Tensor:
    """Rows [n, D] scaled to length 1; a zero row stays zero."""
    return F.normalize(x, dim=-1, eps=EPS)


@kernel_op()
def cosine_forward(u: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """cosine [n], and the lengths of both rows [n, 2] fp32."""
    return u.new_empty(u.shape[0]), u.new_empty(u.shape[0], 2, dtype=torch.float32)


@kernel_op()
def cosine_backward(
    dcosine: Tensor, u: Tensor, v: Tensor, cosine: Tensor, norms: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """du, dv [n, D]."""
    return torch.empty_like(u), torch.empty_like(v)


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor) -> Tensor:
        found, norms = cosine_forward(u, v, EPS)
        ctx.save_for_backward(u, v, found, norms)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcosine: Tensor) -> tuple[Tensor, Tensor]:
        return cosine_backward(dcosine, *ctx.saved_tensors, EPS)
