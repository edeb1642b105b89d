# SPDX-License-Identifier: Apache-2.0
"""g [P] = w J: the gradients J [T, P] of all tasks combined with surgery's weights w [T]."""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.ops.backend import surgery_implementation
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native.surgery import call, check, check_gradients, distinct, matrix


def reference(J: Tensor, w: Tensor | None) -> Tensor:
    """In plain PyTorch; w None stands for one task of weight 1."""
    if w is None:
        return J[0].float()
    total = torch.zeros_like(J[0], dtype=torch.float32)
    for weight, row in zip(w, J, strict=True):
        total += torch.where(weight != 0, weight * row.float(), 0)
    return total


def combine(J: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """g [P] = w J in fp32, from J [T, P] (as in `gram`) and w [T]. A row of weight 0 is ignored, even if not finite."""
    if out is None:
        out = J.new_empty(J.shape[1], dtype=torch.float32)
    _combine(J, w, out)
    return out


@custom_op("combine", mutates_args=("out",))
def _combine(J: Tensor, w: Tensor, out: Tensor) -> None:
    check_gradients(J)
    check("w", w, [J.shape[0]], device=J.device)
    check("out", out, [J.shape[1]], device=J.device)
    distinct(J=J, w=w, out=out)
    match surgery_implementation(J):
        case "triton":
            from minbert_fast.kernels import combine as kernels

            kernels.combine(J, w, out)
        case "native":
            call("combine", J, matrix(J), w, out)
        case "torch":
            out.copy_(reference(J, w))
