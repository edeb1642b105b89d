# SPDX-License-Identifier: Apache-2.0
"""Surgery's arithmetic on the Gram matrix G [T, T]: PCGrad's weights w [T], and the length of w J for clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.ops.adamw import GRADIENT_SCALE, SCALARS
from minbert_fast.ops.backend import surgery_implementation
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native.surgery import call, check, check_tasks, distinct


def pcgrad_reference(gram: Tensor, order: Tensor, mean: bool, skip_own: bool = True) -> tuple[Tensor, Tensor]:
    """In plain PyTorch, all tasks at once: row i of c [T, T] holds the coefficients over J of task i's projected gradient.

    `skip_own` False also projects a gradient against its own task's original.
    """
    finite = gram.diagonal().isfinite()
    usable = torch.where(finite & finite[:, None], gram, 0)
    squares = usable.diagonal()
    c = torch.diag(finite.to(gram.dtype))
    for others in order.T.long():  # the task that each task projects against next
        product = (c * usable[others]).sum(1)
        project = (product < 0) & (squares[others] > 0)
        if skip_own:
            project &= others != torch.arange(len(c), device=c.device)
        step = torch.where(project, product / squares[others], 0)
        c.scatter_add_(1, others[:, None], -step[:, None])
    w = c.mean(0) if mean else c.sum(0)
    return w, (~finite).int()


def pcgrad_weights(gram: Tensor, order: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
    """PCGrad (Yu et al. 2020, arXiv:2001.06782) on the device, from the Gram matrix [T, T] alone.

    order int32 [T, T]: task i's gradient is projected against the tasks of row i in their order (i itself is skipped).
    Returns w [T], so that w J is the sum (or mean) of the projected gradients, and nonfinite int32 [T]: 1 for a
    task whose gradient is not finite. Such a task gets weight 0, and the others the weights they would have without it.
    """
    w, nonfinite = _pcgrad_weights(gram, order, mean)
    return w, nonfinite


@custom_op("pcgrad_weights", mutates_args=())
def _pcgrad_weights(gram: Tensor, order: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    check("gram", gram, [None, None])
    tasks = gram.shape[0]
    check_tasks(tasks)
    check("gram", gram, [tasks, tasks])
    check("order", order, [tasks, tasks], torch.int32, gram.device)
    if surgery_implementation(gram) != "native":
        return pcgrad_reference(gram, order, mean)
    w, nonfinite = gram.new_empty(tasks), order.new_empty(tasks)
    call("pcgrad_weights", gram, gram, order, tasks, mean, w, nonfinite)
    return w, nonfinite


@_pcgrad_weights.register_fake
def _(gram: Tensor, order: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape[0]), order.new_empty(gram.shape[0])


def clip_reference(gram: Tensor, w: Tensor, max_norm: float, extra: Tensor | None, scalars: Tensor) -> Tensor:
    """In plain PyTorch: |w J|^2 = w G w."""
    used = w != 0
    square = torch.where(used & used[:, None], w * w[:, None] * gram, 0).sum()[None]
    norm = (square if extra is None else square + extra).clamp_min(0).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp_max(1) if max_norm > 0 else torch.ones_like(norm)
    finite = norm.isfinite()
    scalars[GRADIENT_SCALE:] = torch.cat([torch.where(finite, scale, 1), (~finite).float()])
    return norm


def clip_scale(gram: Tensor, w: Tensor, max_norm: float, scalars: Tensor, extra: Tensor | None = None) -> Tensor:
    """The norm [1] of w J from the Gram matrix, and the clipping factor min(1, max_norm / (norm + 1e-6)) in `scalars`.

    max_norm 0 disables clipping. `extra` [1] is the squared norm of gradients outside J that are clipped with them. If the
    norm is not finite, the skip flag of `scalars` [4] is set, and adamw then changes nothing.
    """
    norm: Tensor = _clip_scale(gram, w, max_norm, extra, scalars)
    return norm


@custom_op("clip_scale", mutates_args=("scalars",))
def _clip_scale(gram: Tensor, w: Tensor, max_norm: float, extra: Tensor | None, scalars: Tensor) -> Tensor:
    check("w", w, [None])
    tasks = w.shape[0]
    check_tasks(tasks)
    check("gram", gram, [tasks, tasks], device=w.device)
    if extra is not None:
        check("extra", extra, [1], device=w.device)
    check("scalars", scalars, [SCALARS], device=w.device)
    distinct(gram=gram, w=w, extra=extra, scalars=scalars)
    if surgery_implementation(gram) != "native":
        return clip_reference(gram, w, max_norm, extra, scalars)
    norm = w.new_empty(1)
    call("clip_scale", gram, gram, w, tasks, max_norm, extra, scalars, norm)
    return norm


@_clip_scale.register_fake
def _(gram: Tensor, w: Tensor, max_norm: float, extra: Tensor | None, scalars: Tensor) -> Tensor:
    return w.new_empty(1)
