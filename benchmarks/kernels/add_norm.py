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
from benchmarks.kernels.case import DTYPES, EPS, TASKS, Case, P, backward_of, bounds, close, compiled, draw, label
from minbert_fast.ops.add_norm import add_norm_backward, add_norm_forward, reference
from minbert_fast.ops.dropout import keep_mask

SIZES = {"cpu": [(2770, 384), (2770, 768)], "cuda": [(2770, 384), (2770, 768), (8192, 768), (32768, 768), (8192, 1024)]}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # x and residual [N, H]; bias, gamma, beta [H]


def cases(device: torch.device) -> Iterator[Case]:
    seed = torch.tensor([1], device=device)
    for rows, width in SIZES[device.type]:
        for dtype in DTYPES:
            x, residual = (draw(rows, width, dtype=dtype, device=device) for _ in range(2))
            bias, gamma, beta = (draw(width, dtype=dtype, device=device) for _ in range(3))
            inputs = x, bias, residual, gamma, beta
            yield _forward(inputs, seed)
            yield _backward(inputs, seed)


def _eager(x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(residual + F.dropout(x + bias, P), gamma.shape, gamma, beta, EPS)


def _exact(inputs: Inputs, seed: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y in fp32, with the dropout of ours, and the leaves of its graph."""
    leaves = [t.float().requires_grad_() for t in inputs]
    x, bias, residual, gamma, beta = leaves
    keep = keep_mask(seed, 0, torch.arange(len(x), device=x.device), x.shape[1], P)
    return reference(x, bias, residual, gamma, beta, EPS, keep), leaves


def _ours(inputs: Inputs, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean, rstd."""
    result: tuple[Tensor, Tensor, Tensor] = add_norm_forward(*inputs, EPS, P, seed, 0)
    return result


def _forward(inputs: Inputs, seed: Tensor) -> Case:
    x, _, residual, gamma, beta = inputs
    (rows, width), size, dtype = x.shape, x.element_size(), x.dtype

    def check() -> None:
        close("y", _ours(inputs, seed)[0], _exact(inputs, seed)[0].detach(), dtype)

    moved = 3 * size * rows * width + 8 * rows
    candidates = {
        "ours": Candidate(lambda: _ours(inputs, seed), check, moved),
        "eager": Candidate(lambda: _eager(*inputs), None, moved),
        "F.layer_norm alone": Candidate(
            lambda: F.layer_norm(residual, gamma.shape, gamma, beta, EPS), None, 2 * size * rows * width
        ),
    }
    fast = compiled(_eager, x.device)
    if fast is not None:
        candidates["compiled"] = Candidate(lambda: fast(*inputs), None, moved)
    return Case(label("add_norm forward", dtype, rows, width), candidates)


def _backward(inputs: Inputs, seed: Tensor) -> Case:
    x, bias, residual, gamma, beta = inputs
    (rows, width), size, dtype = x.shape, x.element_size(), x.dtype
    dy = draw(rows, width, dtype=dtype, device=x.device)
    _, mean, rstd = _ours(inputs, seed)
    own = torch.empty(3, TASKS, width, device=x.device)
    saved = (x, bias, residual, gamma, mean, rstd, bounds(rows, x.device))

    def ours() -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = add_norm_backward(dy, *saved, P, seed, 0, *own)
        return result

    def check() -> None:
        y, leaves = _exact(inputs, seed)
        dx, dbias, dresidual, dgamma, dbeta = torch.autograd.grad(y, leaves, dy.float())
        got = ours()
        close("dx", got[0], dx, dtype)
        close("dresidual", got[1], dresidual, dtype)
        for name, actual, expected in zip(("dgamma", "dbeta", "dbias"), own, (dgamma, dbeta, dbias), strict=True):
            close(name, actual.sum(0), expected, dtype)

    moved = 5 * size * rows * width + 8 * rows
    leaves = [t.clone().requires_grad_() for t in inputs]
    norm_leaves = [t.clone().requires_grad_() for t in (residual, gamma, beta)]
    alone = F.layer_norm(norm_leaves[0], (width,), norm_leaves[1], norm_leaves[2], EPS)
    candidates = {
        "ours": Candidate(ours, check, moved),
        "eager": Candidate(backward_of(_eager(*leaves), leaves, dy), None, moved),
        "F.layer_norm alone": Candidate(backward_of(alone, norm_leaves, dy), None, 3 * size * rows * width),
    }
    fast = compiled(_eager, x.device)
    if fast is not None:
        candidates["compiled"] = Candidate(backward_of(fast(*leaves), leaves, dy), None, moved)
    return Case(label("add_norm backward", dtype, rows, width), candidates)
