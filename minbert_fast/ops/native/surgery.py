# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery and AdamW by the compiled extension, on CPU and CUDA tensors.

Shapes: T tasks (1 to 64), P parameters. J [T, P] is fp32 or bf16 and its rows may lie any distance apart; Gram
matrices [T, T], weights [T] and everything else is fp32 and contiguous. Each function writes the tensors it is given;
none allocates results or waits for the device. Every ValueError is raised before anything is written.

The numbers of a step lie in one small fp32 tensor on the parameters' device, so that a captured graph follows a
schedule without being captured again:

    scalars [4] = learning rate | step, counted from 1 | factor applied to the gradient | 0, or skip this step

`clip_scale` writes the last two. Triton's adamw reads the same layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minbert_fast import _C
from minbert_fast.ops.native.tensors import DTYPE_CODES, check, contiguous, distinct, pointer, row_stride, threads

#: Positions in the `scalars` tensor.
LEARNING_RATE, STEP, GRADIENT_SCALE, SKIP, SCALARS = 0, 1, 2, 3, 4

MAX_TASKS = _C.max_tasks
GRADIENT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class AdamWSettings:
    """What does not change from step to step.

    style "course": the CS224N project's AdamW (both bias corrections in the step size, eps outside them, decay after
    the update). "torch": torch.optim.AdamW (decay before the update, eps after the correction; always corrected).
    `lr_factor` multiplies the learning rate of `scalars` for this block of parameters.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    correct_bias: bool = True
    style: Literal["course", "torch"] = "course"
    lr_factor: float = 1.0

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}: expected 0 <= beta < 1")
        if not self.eps >= 0.0:
            raise ValueError(f"eps = {self.eps}: expected 0 or more")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"weight_decay = {self.weight_decay}: expected 0 or more")
        if self.style not in ("course", "torch"):
            raise ValueError(f'style = {self.style!r}: expected "course" or "torch"')
        if self.style == "torch" and not self.correct_bias:
            raise ValueError("torch's AdamW always corrects the bias: correct_bias=False needs style='course'")

    def options(self) -> _C.AdamWOptions:
        return _C.AdamWOptions(
            self.lr_factor, *self.betas, self.eps, self.weight_decay, self.correct_bias, self.style == "torch"
        )


# ---- Checks, shared with the PyTorch implementation of the same ops ----------------------------------------------


def check_tasks(tasks: int) -> None:
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"there must be 1 to {MAX_TASKS} tasks, not {tasks}")


def check_rows(name: str, j: Tensor, ndim: int = 2) -> None:
    check(name, j, [None] * ndim, GRADIENT_DTYPES)
    check_tasks(j.shape[0])
    row_stride(name, j)


def check_gram(J: Tensor, out: Tensor) -> None:
    check_rows("J", J)
    contiguous("out", check("out", out, [J.shape[0], J.shape[0]], torch.float32, J.device))
    distinct(J=J, out=out)


def check_pcgrad(gram: Tensor, order: Tensor) -> None:
    contiguous("gram", check("gram", gram, [None, None], torch.float32))
    tasks = gram.shape[0]
    check_tasks(tasks)
    check("gram", gram, [tasks, tasks])
    contiguous("order", check("order", order, [tasks, tasks], torch.int32, gram.device))


def check_combine(J: Tensor, w: Tensor, out: Tensor) -> None:
    check_rows("J", J)
    contiguous("w", check("w", w, [J.shape[0]], torch.float32, J.device))
    contiguous("out", check("out", out, [J.shape[1]], torch.float32, J.device))
    distinct(J=J, w=w, out=out)


def check_clip(gram: Tensor, w: Tensor, extra: Tensor | None, scalars: Tensor) -> None:
    contiguous("w", check("w", w, [None], torch.float32))
    tasks = w.shape[0]
    check_tasks(tasks)
    contiguous("gram", check("gram", gram, [tasks, tasks], torch.float32, w.device))
    if extra is not None:
        check("extra", extra, [1], torch.float32, w.device)
    contiguous("scalars", check("scalars", scalars, [SCALARS], torch.float32, w.device))
    distinct(gram=gram, w=w, extra=extra, scalars=scalars)


def check_adamw(
    J: Tensor,
    w: Tensor | None,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    row_slot: Tensor | None = None,
) -> None:
    """J [T, P] for p [P]; or, with `row_slot` [V], J [T, U, H] for p [V, H]."""
    rows = row_slot is not None
    check_rows("J", J, 3 if rows else 2)
    if w is None and J.shape[0] != 1:
        raise ValueError(f"w may be absent for one task only, and J has {J.shape[0]}")
    if w is not None:
        contiguous("w", check("w", w, [J.shape[0]], torch.float32, J.device))
    shape = [None, J.shape[2]] if rows else [J.shape[1]]
    contiguous("p", check("p", p, shape, torch.float32, J.device))
    for name, moment in (("m", m), ("v", v)):
        contiguous(name, check(name, moment, p.shape, torch.float32, J.device))
    if copy is not None:
        contiguous("copy", check("copy", copy, p.shape, torch.bfloat16, J.device))
    contiguous("scalars", check("scalars", scalars, [SCALARS], torch.float32, J.device))
    if row_slot is not None:
        contiguous("row_slot", check("row_slot", row_slot, [p.shape[0]], torch.int32, J.device))
    distinct(J=J, w=w, p=p, m=m, v=v, copy=copy, scalars=scalars, row_slot=row_slot)


# ---- The ops --------------------------------------------------------------------------------------------------------


def matrix(j: Tensor) -> _C.Matrix:
    return _C.Matrix(j.data_ptr(), DTYPE_CODES[j.dtype], j.shape[0], j.shape[1:].numel(), row_stride("J", j))


def parameters(p: Tensor, m: Tensor, v: Tensor, copy: Tensor | None) -> _C.Parameters:
    return _C.Parameters(p.data_ptr(), m.data_ptr(), v.data_ptr(), pointer(copy), p.numel())


def queue(tensor: Tensor) -> _C.Queue:
    """The caller's current stream on the tensor's device."""
    return _C.Queue(tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream)


def gram(J: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out [T, T] = J J^T (or += it), J read once. Sums run in a fixed order, whatever the number of threads."""
    check_gram(J, out)
    if J.is_cuda:
        workspace = J.new_empty(_C.cuda_gram_workspace(J.device.index, *J.shape), dtype=torch.float32)
        _C.cuda_gram(queue(J), matrix(J), workspace.data_ptr(), out.data_ptr(), accumulate)
    else:
        _C.gram(matrix(J), out.data_ptr(), accumulate, threads())


def pcgrad_weights(gram: Tensor, order: Tensor, mean: bool, w: Tensor, nonfinite: Tensor) -> None:
    """w [T]: PCGrad's projections from `gram` [T, T] alone, task i's conflicts taken out in the order order[i] [T].

    nonfinite int32 [T] tells whose gradient is not finite: those tasks get weight 0 and leave the others alone.
    """
    check_pcgrad(gram, order)
    tasks = gram.shape[0]
    contiguous("w", check("w", w, [tasks], torch.float32, gram.device))
    contiguous("nonfinite", check("nonfinite", nonfinite, [tasks], torch.int32, gram.device))
    distinct(gram=gram, order=order, w=w, nonfinite=nonfinite)
    arguments = (gram.data_ptr(), order.data_ptr(), tasks, mean, w.data_ptr(), nonfinite.data_ptr())
    if gram.is_cuda:
        _C.cuda_pcgrad_weights(queue(gram), *arguments)
    else:
        _C.pcgrad_weights(*arguments)


def combine(J: Tensor, w: Tensor, out: Tensor) -> None:
    """out [P] = w J, J read once; rows of weight 0 are not read at all."""
    check_combine(J, w, out)
    if J.is_cuda:
        _C.cuda_combine(queue(J), matrix(J), w.data_ptr(), out.data_ptr())
    else:
        _C.combine(matrix(J), w.data_ptr(), out.data_ptr(), threads())


def clip_scale(gram: Tensor, w: Tensor, max_norm: float, extra: Tensor | None, scalars: Tensor, norm: Tensor) -> None:
    """norm [1] = the length of w J, from |w J|^2 = w G w (+ extra [1], the squared norm of gradients outside J).

    Writes min(1, max_norm / (norm + 1e-6)) as the gradient's factor into `scalars` (1 when max_norm is 0), and 1 as
    the skip flag when the norm is not finite.
    """
    check_clip(gram, w, extra, scalars)
    contiguous("norm", check("norm", norm, [1], torch.float32, w.device))
    distinct(gram=gram, w=w, extra=extra, scalars=scalars, norm=norm)
    arguments = (
        gram.data_ptr(), w.data_ptr(), w.shape[0], pointer(extra), max_norm, scalars.data_ptr(), norm.data_ptr(),
    )  # fmt: skip
    if gram.is_cuda:
        _C.cuda_clip_scale(queue(gram), *arguments)
    else:
        _C.clip_scale(*arguments)


def adamw(
    J: Tensor,
    w: Tensor | None,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    settings: AdamWSettings,
) -> None:
    """One AdamW step of p [P] on the gradient w J, which is never written; w may be absent when J [1, P] is it.

    m, v [P]: Adam's moments. copy [P] bf16: receives the new p, rounded.
    """
    check_adamw(J, w, p, m, v, copy, scalars)
    block, options = parameters(p, m, v, copy), settings.options()
    if J.is_cuda:
        _C.cuda_adamw(queue(J), matrix(J), pointer(w), block, options, scalars.data_ptr())
    else:
        _C.adamw(matrix(J), pointer(w), block, options, scalars.data_ptr(), threads())


def adamw_rows(
    J: Tensor,
    w: Tensor | None,
    row_slot: Tensor,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    copy: Tensor | None,
    scalars: Tensor,
    settings: AdamWSettings,
) -> None:
    """The same exact step of a table p [V, H] of which few rows have a gradient: J [T, U, H], U of them.

    row_slot int32 [V]: which of the U rows is row v's gradient, -1 for none (its moments decay all the same). On the
    CPU a slot of U or more is a ValueError; on a GPU, where nothing waits to look, it counts as none.
    """
    check_adamw(J, w, p, m, v, copy, scalars, row_slot)
    block, options = parameters(p, m, v, copy), settings.options()
    if not p.numel():
        return
    if J.is_cuda:
        _C.cuda_adamw_rows(
            queue(J), matrix(J), pointer(w), row_slot.data_ptr(), p.shape[1], block, options, scalars.data_ptr()
        )
    else:
        _C.adamw_rows(
            matrix(J), pointer(w), row_slot.data_ptr(), p.shape[1], block, options, scalars.data_ptr(), threads()
        )
