# SPDX-License-Identifier: Apache-2.0
"""One AdamW step on the combined gradient g = w J, in one pass over memory that never writes g.

A small fp32 tensor on the parameters' device holds the numbers of a step, so that a captured graph follows a schedule:

    scalars [4] = learning rate | step, counted from 1 | factor of the gradient | skip: if not 0, the step changes nothing

`clip_scale` writes the last two.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from minbert_fast.ops.backend import surgery_implementation
from minbert_fast.ops.combine import reference as combined
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.native.surgery import adamw_struct, call, check, check_gradients, distinct, matrix

#: Positions in `scalars`, and their number.
LEARNING_RATE, STEP, GRADIENT_SCALE, SKIP, SCALARS = range(5)


class AdamWStep(NamedTuple):
    """The arguments of `adamw`. Tensors are fp32 and contiguous unless a comment says otherwise.

    Dense: p [P], J [T, P]. By rows: a table p [V, H] of which U rows have a gradient, J [T, U, H]. The other rows take
    the step that a dense AdamW takes on a gradient of zero.
    """

    J: Tensor  # the tasks' gradients, fp32 or bf16, any task stride
    w: Tensor | None  # [T]; a row of weight 0 is ignored, even if not finite. None: J is one task's plain gradient
    p: Tensor  # the parameters
    m: Tensor  # Adam's first moment, of p's shape
    v: Tensor  # Adam's second moment
    scalars: Tensor  # [4], as above
    copy: Tensor | None = None  # bf16 of p's shape: receives the new p
    row_slot: Tensor | None = None  # int32 [V]: which of the U rows is row r's gradient, -1 for none
    lr_factor: float = 1.0  # of the learning rate, for this block of parameters
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    correct_bias: bool = True


def reference(a: AdamWStep) -> None:
    """In plain PyTorch.

    The course's AdamW: the bias corrections belong to the step size (Kingma & Ba 2014, end of section 2), epsilon is
    outside them, and the decay (Loshchilov & Hutter 2019) comes after the update.
    """
    lr, step, scale, skip = a.scalars.unbind()
    lr = lr * a.lr_factor
    g = combined(a.J, a.w)
    if a.row_slot is not None:
        g = torch.cat([g, g.new_zeros(1, g.shape[1])])[a.row_slot.long()]  # slot -1 finds the zeros at the end
    g = g * scale
    m = a.beta1 * a.m + (1 - a.beta1) * g
    v = a.beta2 * a.v + (1 - a.beta2) * g * g
    correction1 = 1 - a.beta1**step if a.correct_bias else 1.0
    correction2 = (1 - a.beta2**step) ** 0.5 if a.correct_bias else 1.0
    p = (1 - lr * a.weight_decay) * (a.p - lr * correction2 / correction1 * m / (v.sqrt() + a.eps))
    for old, new in ((a.p, p), (a.m, m), (a.v, v)):
        old.copy_(torch.where(skip != 0, old, new))
    if a.copy is not None:
        a.copy.copy_(torch.where(skip != 0, a.copy, a.p.to(a.copy.dtype)))


def adamw(step: AdamWStep) -> None:
    """Updates p, m, v and the copy in place.

    Raises ValueError for tensors and settings that do not fit, before anything is written. A slot of U or more is a
    ValueError on the CPU. A GPU treats it as none, because a check would wait for the device.
    """
    _adamw(*step)


def check_settings(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """ValueError for AdamW settings that are out of range."""
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas = {betas}: expected 0 <= beta < 1")
    if not eps >= 0.0:
        raise ValueError(f"eps = {eps}: expected 0 or more")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay = {weight_decay}: expected 0 or more")


def _check(a: AdamWStep) -> None:
    check_settings((a.beta1, a.beta2), a.eps, a.weight_decay)
    rows = a.row_slot is not None
    check_gradients(a.J, 3 if rows else 2)
    tasks, device = a.J.shape[0], a.J.device
    if a.w is None and tasks != 1:
        raise ValueError(f"w may be absent for one task only, and J has {tasks}")
    shape = [None, a.J.shape[2]] if rows else [a.J.shape[1]]
    check("p", a.p, shape, device=device)
    shapes = {"w": [tasks], "m": a.p.shape, "v": a.p.shape, "scalars": [SCALARS], "copy": a.p.shape}
    dtypes = {"copy": torch.bfloat16, "row_slot": torch.int32}
    for name, size in (shapes | {"row_slot": a.p.shape[:1]}).items():
        tensor = getattr(a, name)
        if tensor is not None:
            check(name, tensor, size, dtypes.get(name, torch.float32), device)
    distinct(J=a.J, w=a.w, p=a.p, m=a.m, v=a.v, copy=a.copy, scalars=a.scalars, row_slot=a.row_slot)


def _run(*arguments: Any) -> None:
    step = AdamWStep(*arguments)
    _check(step)
    match surgery_implementation(step.J):
        case "triton":
            from minbert_fast.kernels import adamw as kernels

            kernels.adamw(*step)
        case "native":
            call("adamw", step.J, matrix(step.J), step.w, adamw_struct(step))
        case "torch":
            reference(step)


# The op's schema is the tuple's list of fields.
_run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in get_type_hints(AdamWStep).items()
    ],
    return_annotation=None,
)
_adamw = custom_op("adamw", mutates_args=("p", "m", "v", "copy"))(_run)
