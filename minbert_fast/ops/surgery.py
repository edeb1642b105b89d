# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery as ops that torch.compile and CUDA graphs understand.

The compiled extension runs them on the CPU and, where it was built with CUDA, on a GPU; plain PyTorch elsewhere.
Shapes and meanings are those of minbert_fast.ops.native.surgery; all raise ValueError for tensors that do not fit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.ops import native
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native import surgery as compiled
from minbert_fast.ops.native.surgery import AdamWSettings

__all__ = ["AdamWSettings", "clip_scale", "combine", "combine_adamw", "combine_adamw_rows", "gram", "pcgrad_weights"]


def _native(tensor: Tensor) -> bool:
    """Whether the extension serves tensors like this one (there is no Triton version of these ops)."""
    if implementation(tensor) == "torch":
        return False
    return tensor.device.type == "cpu" or (tensor.is_cuda and native.HAS_CUDA)


# ---- gram ---------------------------------------------------------------------------------------------------------


@custom_op("gram", mutates_args=("out",))
def _gram(J: Tensor, out: Tensor, accumulate: bool) -> None:
    if _native(J):
        compiled.gram(J, out, accumulate)
    else:
        compiled.check_gram(J, out)
        rows = J.float()
        torch.addmm(out, rows, rows.T, beta=int(accumulate), out=out)


@_gram.register_fake
def _(J: Tensor, out: Tensor, accumulate: bool) -> None:
    return None


def gram(J: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """G [T, T] = J J^T of gradients J [T, P], fp32; `accumulate` adds to `out` instead (J may come in pieces)."""
    if out is None:
        if accumulate:
            raise ValueError("gram can only accumulate into a given out")
        out = J.new_empty(J.shape[0], J.shape[0], dtype=torch.float32)
    _gram(J, out, accumulate)
    return out


# ---- weights ------------------------------------------------------------------------------------------------------


@custom_op("pcgrad_weights", mutates_args=())
def _pcgrad_weights(gram: Tensor, order: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    compiled.check_pcgrad(gram, order)
    if _native(gram):
        w, nonfinite = gram.new_empty(gram.shape[0]), order.new_empty(gram.shape[0])
        compiled.pcgrad_weights(gram, order, mean, w, nonfinite)
        return w, nonfinite
    return _pcgrad_weights_torch(gram, order, mean)


def _pcgrad_weights_torch(gram: Tensor, order: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """All tasks at once: c [T, T], row i the coefficients over J of task i's projected gradient."""
    finite = gram.diagonal().isfinite()
    usable = torch.where(finite & finite[:, None], gram, 0)
    squares = usable.diagonal()
    c = torch.diag(finite.to(gram.dtype))
    for others in order.T.long():  # the task that each task projects against next
        product = (c * usable[others]).sum(1)
        project = (product < 0) & (squares[others] > 0) & (others != torch.arange(len(c), device=c.device))
        step = torch.where(project, product / squares[others], 0)
        c.scatter_add_(1, others[:, None], -step[:, None])
    w = c.mean(0) if mean else c.sum(0)
    return w, (~finite).int()


@_pcgrad_weights.register_fake
def _(gram: Tensor, order: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    return gram.new_empty(gram.shape[0]), order.new_empty(gram.shape[0])


def pcgrad_weights(gram: Tensor, order: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
    """PCGrad (Yu et al. 2020, arXiv:2001.06782) on the device, from the Gram matrix [T, T] alone.

    order int32 [T, T]: row i lists the tasks whose conflicts are taken out of task i's gradient, in turn (i itself is
    passed over). Returns w [T], so that w J is the sum (or mean) of the projected gradients, and nonfinite int32 [T]:
    1 for tasks whose gradient is not finite. Those get weight 0, and the others the weights they would have without.
    """
    w, nonfinite = _pcgrad_weights(gram, order, mean)
    return w, nonfinite


@custom_op("clip_scale", mutates_args=("scalars",))
def _clip_scale(gram: Tensor, w: Tensor, max_norm: float, extra: Tensor | None, scalars: Tensor) -> Tensor:
    compiled.check_clip(gram, w, extra, scalars)
    norm = w.new_empty(1)
    if _native(gram):
        compiled.clip_scale(gram, w, max_norm, extra, scalars, norm)
        return norm
    used = w != 0
    square = torch.where(used & used[:, None], w * w[:, None] * gram, 0).sum()[None]
    norm = (square if extra is None else square + extra).clamp_min(0).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp_max(1) if max_norm > 0 else torch.ones_like(norm)
    finite = norm.isfinite()
    scalars[compiled.GRADIENT_SCALE :] = torch.cat([torch.where(finite, scale, 1), (~finite).float()])
    return norm


@_clip_scale.register_fake
def _(gram: Tensor, w: Tensor, max_norm: float, extra: Tensor | None, scalars: Tensor) -> Tensor:
    return w.new_empty(1)


def clip_scale(gram: Tensor, w: Tensor, max_norm: float, scalars: Tensor, extra: Tensor | None = None) -> Tensor:
    """The norm [1] of w J from the Gram matrix, and the clipping factor min(1, max_norm / (norm + 1e-6)) in `scalars`.

    max_norm 0 bounds nothing. `extra` [1]: the squared norm of gradients outside J, clipped along. When the norm is
    not finite the skip flag of `scalars` is set: combine_adamw then leaves everything as it is.
    """
    norm: Tensor = _clip_scale(gram, w, max_norm, extra, scalars)
    return norm


# ---- combine and step ---------------------------------------------------------------------------------------------


def _combine_torch(J: Tensor, w: Tensor | None) -> Tensor:
    """w J in fp32, rows of weight 0 left out whatever they hold."""
    if w is None:
        return J[0].float()
    total = torch.zeros_like(J[0], dtype=torch.float32)
    for weight, row in zip(w, J, strict=True):
        total += torch.where(weight != 0, weight * row.float(), 0)
    return total


@custom_op("combine", mutates_args=("out",))
def _combine(J: Tensor, w: Tensor, out: Tensor) -> None:
    if _native(J):
        compiled.combine(J, w, out)
    else:
        compiled.check_combine(J, w, out)
        out.copy_(_combine_torch(J, w))


@_combine.register_fake
def _(J: Tensor, w: Tensor, out: Tensor) -> None:
    return None


def combine(J: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """g [P] = w J in fp32, from J [T, P] and w [T]; rows of weight 0 take no part, whatever they hold."""
    if out is None:
        out = J.new_empty(J.shape[1], dtype=torch.float32)
    _combine(J, w, out)
    return out


@custom_op("combine_adamw", mutates_args=("p", "m", "v", "copy"))
def _combine_adamw(
    J: Tensor,
    w: Tensor | None,
    row_slot: Tensor | None,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    correct_bias: bool,
    torch_style: bool,
    lr_factor: float,
) -> None:
    style = "torch" if torch_style else "course"
    settings = AdamWSettings((beta1, beta2), eps, weight_decay, correct_bias, style, lr_factor)  # type: ignore[arg-type]
    if not _native(J):
        compiled.check_adamw(J, w, p, m, v, copy, scalars, row_slot)
        _adamw_torch(J, w, row_slot, p, m, v, copy, scalars, settings)
    elif row_slot is None:
        compiled.adamw(J, w, p, m, v, copy, scalars, settings)
    else:
        compiled.adamw_rows(J, w, row_slot, p, m, v, copy, scalars, settings)


def _adamw_torch(
    J: Tensor,
    w: Tensor | None,
    row_slot: Tensor | None,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    settings: AdamWSettings,
) -> None:
    lr, step, scale, skip = scalars.unbind()
    lr = lr * settings.lr_factor
    beta1, beta2 = settings.betas
    g = _combine_torch(J, w)
    if row_slot is not None:
        untouched = torch.cat([g, g.new_zeros(1, g.shape[1])])  # slot -1 finds the zeros at the end
        g = untouched[row_slot.long()]
    g = g * scale
    new_m = beta1 * m + (1 - beta1) * g
    new_v = beta2 * v + (1 - beta2) * g * g
    correction1 = 1 - beta1**step if settings.correct_bias else 1.0
    correction2 = (1 - beta2**step) ** 0.5 if settings.correct_bias else 1.0
    decay = 1 - lr * settings.weight_decay
    if settings.style == "torch":
        new_p = decay * p - lr / correction1 * new_m / (new_v.sqrt() / correction2 + settings.eps)
    else:
        new_p = decay * (p - lr * correction2 / correction1 * new_m / (new_v.sqrt() + settings.eps))
    for old, new in ((p, new_p), (m, new_m), (v, new_v)):
        old.copy_(torch.where(skip != 0, old, new))
    if copy is not None:
        copy.copy_(torch.where(skip != 0, copy, p.to(copy.dtype)))


@_combine_adamw.register_fake
def _(
    J: Tensor,
    w: Tensor | None,
    row_slot: Tensor | None,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    correct_bias: bool,
    torch_style: bool,
    lr_factor: float,
) -> None:
    return None


def combine_adamw(
    J: Tensor,
    w: Tensor | None,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: Tensor,
    settings: AdamWSettings,
    copy: Tensor | None = None,
) -> None:
    """One AdamW step of p [P] on the gradient w J, in one pass over memory that never writes the gradient.

    J [T, P], w [T] (absent when J is one task's plain gradient), m and v [P] Adam's moments, `copy` [P] the bf16
    image of p, `scalars` [4] as in minbert_fast.ops.native.surgery.
    """
    _combine_adamw(J, w, None, p, m, v, copy, scalars, *_flat(settings))


def combine_adamw_rows(
    J: Tensor,
    w: Tensor | None,
    row_slot: Tensor,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    scalars: Tensor,
    settings: AdamWSettings,
    copy: Tensor | None = None,
) -> None:
    """The same step of a table p [V, H] of which U rows have a gradient: J [T, U, H], row_slot int32 [V] (-1: none).

    Exact: rows without a gradient take the step that a dense AdamW takes on a gradient of zero.
    """
    _combine_adamw(J, w, row_slot, p, m, v, copy, scalars, *_flat(settings))


def _flat(s: AdamWSettings) -> tuple[float, float, float, float, bool, bool, float]:
    return (*s.betas, s.eps, s.weight_decay, s.correct_bias, s.style == "torch", s.lr_factor)
