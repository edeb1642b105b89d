# SPDX-License-Identifier: Apache-2.0
"""G [T, T] = J J^T, the inner products of T tasks' gradients J [T, P]: all that surgery needs to know of J."""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.ops.backend import surgery_implementation
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native.surgery import call, check, check_gradients, distinct, matrix


def reference(J: Tensor, out: Tensor, accumulate: bool) -> None:
    """In plain PyTorch."""
    rows = J.float()
    product = rows @ rows.T
    product = (product + product.T) / 2  # a BLAS may sum its two halves in different orders
    out.copy_(out + product if accumulate else product)


def gram(J: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """G [T, T] = J J^T in fp32; `accumulate` adds to `out` instead (J may come in pieces).

    J [T, P] is fp32 or bf16, T 1 to 64; its rows may lie any distance apart. J is read once, and sums run in a fixed
    order. Raises ValueError for tensors that do not fit.
    """
    if out is None:
        if accumulate:
            raise ValueError("gram can only accumulate into a given out")
        out = J.new_empty(J.shape[0], J.shape[0], dtype=torch.float32)
    _gram(J, out, accumulate)
    return out


@custom_op("gram", mutates_args=("out",))
def _gram(J: Tensor, out: Tensor, accumulate: bool) -> None:
    check_gradients(J)
    check("out", out, [J.shape[0], J.shape[0]], device=J.device)
    distinct(J=J, out=out)
    match surgery_implementation(J):
        case "triton":
            from minbert_fast.kernels import gram as kernels

            kernels.gram(J, out, accumulate)
        case "native":
            workspace = J.new_empty(call("gram_workspace", J, *J.shape), dtype=torch.uint8)
            call("gram", J, matrix(J), workspace, out, accumulate)
        case "torch":
            reference(J, out, accumulate)
