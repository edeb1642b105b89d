# SPDX-License-Identifier: Apache-2.0
"""bias_gelu: GELU(x + bias), forward and backward, against eager and compiled.

Bytes, e an element: forward reads x and writes y, 2 e N F; backward reads dy and x and writes dx, 3 e N F.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Candidate
from benchmarks.kernels.case import DTYPES, TASKS, Case, backward_of, bounds, close, compiled, draw, label
from minbert_fast.ops.bias_gelu import bias_gelu_backward, bias_gelu_forward

SIZES = {"cpu": [(2770, 1536), (2770, 3072)], "cuda": [(2770, 1536), (2770, 3072), (8192, 3072), (32768, 3072)]}


def cases(device: torch.device) -> Iterator[Case]:
    for rows, width in SIZES[device.type]:
        for dtype in DTYPES:
            yield from _cases(rows, width, dtype, device)


def _cases(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    x, dy = (draw(rows, width, dtype=dtype, device=device) for _ in range(2))
    bias = draw(width, dtype=dtype, device=device)
    tasks = bounds(rows, device)
    own = torch.empty(TASKS, width, device=device)

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    def check() -> None:
        close("y", bias_gelu_forward(x, bias), eager(x.float(), bias.float()), dtype)

    fast = compiled(eager, device)
    moved = 2 * x.element_size() * rows * width
    candidates = {
        "ours": Candidate(lambda: bias_gelu_forward(x, bias), check, moved),
        "eager": Candidate(lambda: eager(x, bias), None, moved),
    }
    if fast is not None:
        candidates["compiled"] = Candidate(lambda: fast(x, bias), None, moved)
    yield Case(label("bias_gelu forward", dtype, rows, width), candidates)

    def ours_backward() -> Tensor:
        dx: Tensor = bias_gelu_backward(dy, x, bias, tasks, own)
        return dx

    def check_backward() -> None:
        leaves = [x.float().requires_grad_(), bias.float().requires_grad_()]
        dx, dbias = torch.autograd.grad(eager(*leaves), leaves, dy.float())
        close("dx", ours_backward(), dx, dtype)
        close("dbias", own.sum(0), dbias, dtype)

    moved = 3 * x.element_size() * rows * width
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    candidates = {
        "ours": Candidate(ours_backward, check_backward, moved),
        "eager": Candidate(backward_of(eager(*leaves), leaves, dy), None, moved),
    }
    if fast is not None:
        candidates["compiled"] = Candidate(backward_of(fast(*leaves), leaves, dy), None, moved)
    yield Case(label("bias_gelu backward", dtype, rows, width), candidates)
