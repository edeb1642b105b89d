# SPDX-License-Identifier: Apache-2.0
"""Every op of the package once more, in plain PyTorch, the obvious way.

This is the ground truth of the tests (call it with fp64 tensors) and the honest baseline of the benchmarks: what a
course project has, neither slowed down nor tuned. Dropout masks are arguments here (`keep`, already scaled by
1 / (1 - p)), so that a test can hand in the very mask that a kernel drew.

Shapes: N tokens, B sentences, S positions, T tasks, H hidden, h heads, d = H / h, F intermediate, V words, P
parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- Ops on packed tokens ---------------------------------------------------------------------------------------


def attention(
    qkv: Tensor, cu_seqlens: Sequence[int], scale: float, keep: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Multi-head self-attention, one sentence at a time: softmax(q k^T scale) v ("Attention Is All You Need", eq. 1).

    qkv [N, 3, h, d]; sentence b owns rows cu_seqlens[b] to cu_seqlens[b + 1]; `keep[b]` [h, s, s] multiplies its
    probabilities. Returns the output [N, h * d] (rows of no sentence are zero) and the log-sum-exp [h, N].
    """
    rows, _, heads, width = qkv.shape
    out = qkv.new_zeros(rows, heads * width)
    lse = qkv.new_zeros(heads, rows)
    for sentence, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        if begin == end:
            continue
        q, k, v = (t.transpose(0, 1) for t in qkv[begin:end].unbind(1))  # each [h, s, d]
        scores = q @ k.transpose(1, 2) * scale  # [h, s, s]
        probabilities = scores.softmax(-1)
        if keep is not None:
            probabilities = probabilities * keep[sentence]
        out[begin:end] = (probabilities @ v).transpose(0, 1).reshape(end - begin, -1)
        lse[:, begin:end] = scores.logsumexp(-1)
    return out, lse


def attention_dense(qkv: Tensor, mask: Tensor, scale: float, keep: Tensor | None = None) -> Tensor:
    """Attention on a rectangle: qkv [B, S, 3, h, d], mask [B, S] with padding anywhere -> [B, S, h * d].

    Queries with mask 0 give zeros, and so does a row without any attended key. `keep` is [B, h, S, S].
    """
    batch, length, _, heads, width = qkv.shape
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))  # each [B, h, S, d]
    attended = mask.bool()
    scores = q @ k.transpose(2, 3) * scale  # [B, h, S, S]
    scores = scores.masked_fill(~attended[:, None, None, :], -math.inf)
    scores = scores.masked_fill(~attended.any(1)[:, None, None, None], 0.0)
    probabilities = scores.softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep
    out = (probabilities @ v).transpose(1, 2).reshape(batch, length, heads * width)
    return out * attended[:, :, None].to(out.dtype)


def add_norm(
    x: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float, keep: Tensor | None = None
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the last dimension; x, residual, keep [N, H]."""
    branch = x + bias
    if keep is not None:
        branch = branch * keep
    return F.layer_norm(residual + branch, gamma.shape, gamma, beta, eps)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) in the erf form that BERT uses (Hendrycks & Gimpel 2016); x [N, F], bias [F]."""
    return F.gelu(x + bias)


def embedding(
    tokens: Tensor,
    positions: Tensor,
    types: Tensor,
    word: Tensor,
    position: Tensor,
    type_: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    keep: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[tokens] + position[positions] + type[types])); indices [N], tables [., H] -> [N, H]."""
    total = word[tokens.long()] + position[positions.long()] + type_[types.long()]
    y = F.layer_norm(total, gamma.shape, gamma, beta, eps)
    return y if keep is None else y * keep


def segment_gradients(dy: Tensor, x: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Per-task gradients of y = x W^T + b: J[t] = dy[rows of t]^T x[rows of t] [T, O, I], and row sums [T, O]."""
    segments = list(itertools.pairwise(bounds))
    weight = torch.stack([dy[begin:end].T @ x[begin:end] for begin, end in segments])
    bias = torch.stack([dy[begin:end].sum(0) for begin, end in segments])
    return weight, bias


# ---- The course's optimizer and the classic surgery loop -----------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """The course's AdamW, one parameter at a time.

    Kingma & Ba 2014 with the "efficient" bias correction at the end of its section 2 (epsilon outside it), then
    Loshchilov & Hutter 2019's decay, applied after the update with the learning rate in it.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                step_size = group["lr"]
                if group["correct_bias"]:
                    step_size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-step_size)
                if group["weight_decay"]:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])
        return loss


def pcgrad(gradients: Sequence[Tensor], orders: Sequence[Sequence[int]], reduction: str = "sum") -> Tensor:
    """PCGrad (Yu et al. 2020, algorithm 1) on flat gradients, the classic loop over whole vectors.

    `orders[i]` lists the tasks whose conflicts are taken out of task i's gradient, in turn (i itself is skipped).
    Each projection uses the other tasks' original gradients. Returns the sum or mean of the projected gradients [P].
    """
    projected = [g.clone() for g in gradients]
    for i, g in enumerate(projected):
        for j in orders[i]:
            if j == i:
                continue
            product = torch.dot(g, gradients[j])
            squared = torch.dot(gradients[j], gradients[j])
            if product < 0 and squared > 0:
                g -= product / squared * gradients[j]
    total = torch.stack(projected).sum(0)
    return total / len(projected) if reduction == "mean" else total


# ---- The naive multitask step: one backward a task, flattened, projected, written back ---------------------------


def flatten_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The parameters' gradients end to end [P], zero where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def task_gradients(losses: Sequence[Tensor], shared: Sequence[nn.Parameter]) -> list[Tensor]:
    """One backward a task over the whole graph: each task's flat gradient of the `shared` parameters [P].

    Other parameters (heads) are left with the sum of their tasks' gradients in `.grad`.
    """
    gradients = []
    for loss in losses:
        for p in shared:
            p.grad = None
        loss.backward(retain_graph=True)
        gradients.append(flatten_gradients(shared))
    return gradients


def write_gradient(shared: Sequence[nn.Parameter], merged: Tensor) -> None:
    """A flat gradient [P] back into the parameters' `.grad`."""
    offset = 0
    for p in shared:
        p.grad = merged[offset : offset + p.numel()].view_as(p).clone()
        offset += p.numel()
