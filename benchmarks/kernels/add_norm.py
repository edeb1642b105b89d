# SPDX-License-Identifier: Apache-2.0
"""add_norm: LayerNorm(residual + dropout(x + bias)), forward and backward, against eager, compiled and LayerNorm alone.

Bytes, e an element: forward reads x and residual and writes y, 3 e N H + 8 N (statistics); backward reads dy, x,
residual and writes dx and dresidual, 5 e N H + 8 N.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Candidate
from benchmarks.kernels.case import EPS, TASKS, Case, P, backward_of, bounds, close, compiled, draw, dtypes, label
from minbert_fast.ops.add_norm import add_norm_backward, add_norm_forward, reference
from minbert_fast.ops.dropout import keep_mask

SIZES = {"cpu": [(2770, 384), (2770, 768)], "cuda": [(2770, 384), (2770, 768), (8192, 768), (32768, 768), (8192, 1024)]}


def cases(device: torch.device) -> Iterator[Case]:
    for rows, width in SIZES[device.type]:
        for dtype in dtypes(device):
            yield from _cases(rows, width, dtype, device)


def _cases(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    x, residual, dy = (draw(rows, width, dtype=dtype, device=device) for _ in range(3))
    bias, gamma, beta = (draw(width, dtype=dtype, device=device) for _ in range(3))
    seed = torch.tensor([1], device=device)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = add_norm_forward(x, bias, residual, gamma, beta, EPS, P, seed, 0)
        return result

    def eager(x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x + bias, P), (width,), gamma, beta, EPS)

    def exact() -> tuple[Tensor, list[Tensor]]:
        leaves = [t.float().requires_grad_() for t in (x, bias, residual, gamma, beta)]
        keep = keep_mask(seed, 0, torch.arange(rows, device=device), width, P)
        a, b, c, d, e = leaves
        return reference(a, b, c, d, e, EPS, keep), leaves

    def check() -> None:
        close("y", ours()[0], exact()[0].detach(), dtype)

    moved = 3 * x.element_size() * rows * width + 8 * rows
    inputs = (x, bias, residual, gamma, beta)
    candidates = {
        "ours": Candidate(ours, check, moved),
        "eager": Candidate(lambda: eager(*inputs), None, moved),
        "F.layer_norm alone": Candidate(
            lambda: F.layer_norm(residual, (width,), gamma, beta, EPS), None, 2 * x.element_size() * rows * width
        ),
    }
    fast = compiled(eager, device)
    if fast is not None:
        candidates["compiled"] = Candidate(lambda: fast(*inputs), None, moved)
    yield Case(label("add_norm forward", dtype, rows, width), candidates)

    _, mean, rstd = ours()
    own = torch.empty(3, TASKS, width, device=device)
    tasks = bounds(rows, device)

    def ours_backward() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = add_norm_backward(
            dy, x, bias, residual, gamma, mean, rstd, tasks, P, seed, 0, *own
        )
        return result

    def check_backward() -> None:
        y, leaves = exact()
        dx, dbias, dresidual, dgamma, dbeta = torch.autograd.grad(y, leaves, dy.float())
        got = ours_backward()
        close("dx", got[0], dx, dtype)
        close("dresidual", got[1], dresidual, dtype)
        for name, actual, expected in zip(("dgamma", "dbeta", "dbias"), own, (dgamma, dbeta, dbias), strict=True):
            close(name, actual.sum(0), expected, dtype)

    moved = 5 * x.element_size() * rows * width + 8 * rows
    leaves = [t.clone().requires_grad_() for t in inputs]
    norm_leaves = [t.clone().requires_grad_() for t in (residual, gamma, beta)]
    alone = F.layer_norm(norm_leaves[0], (width,), norm_leaves[1], norm_leaves[2], EPS)
    candidates = {
        "ours": Candidate(ours_backward, check_backward, moved),
        "eager": Candidate(backward_of(eager(*leaves), leaves, dy), None, moved),
        "F.layer_norm alone": Candidate(backward_of(alone, norm_leaves, dy), None, 3 * x.element_size() * rows * width),
    }
    if fast is not None:
        candidates["compiled"] = Candidate(backward_of(fast(*leaves), leaves, dy), None, moved)
    yield Case(label("add_norm backward", dtype, rows, width), candidates)
