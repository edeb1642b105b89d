# SPDX-License-Identifier: Apache-2.0
"""What a training step decides between the Gram matrix and the update: norm, clipping, skipping, step counts.

Shapes: T tasks, R rows of J (T, or 1 for the tasks' sum), L labels of parameter groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.ops.adamw import GRADIENT_SCALE, SKIP, STEP
from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import custom_op
from minbert_fast.ops.weights import clip_scale


def reference(
    values: Tensor, gram: Tensor, w: Tensor, heads: Tensor, max_norm: float, scalars: Tensor, taking: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain PyTorch and `clip_scale`."""
    nonfinite = ~torch.isfinite(values)
    if len(w) == len(values):
        nonfinite |= ~gram.diagonal().isfinite()
    norm = clip_scale(gram, w, max_norm, scalars[0], heads.square().sum()[None])
    skip = nonfinite.any() | ~torch.isfinite(norm)
    scalars[1:, GRADIENT_SCALE] = scalars[0, GRADIENT_SCALE]
    scalars[:, STEP] += taking * (1.0 - skip.to(scalars.dtype))
    scalars[:, SKIP] = skip.to(scalars.dtype)
    return norm, nonfinite, skip


def settle(
    values: Tensor, gram: Tensor, w: Tensor, heads: Tensor, max_norm: float, scalars: Tensor, taking: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm [] of the combined gradient, tasks that are not finite [T] bool, and whether to skip the step [] bool.

    values [T] are the losses; gram [R, R] and w [R] as for `clip_scale`; heads [n] are gradients outside J that are clipped
    with it. A task is not finite if its loss is not, or its gradient where R = T. A step is skipped if any task or the norm
    is not finite. scalars [L, 4], as `AdamWStep` has them, get the clipping scale, the skip flag, and, unless the step is
    skipped, one more step for labels that are 1 in `taking` [L].
    """
    norm, nonfinite, skip = _settle(values, gram, w, heads, max_norm, scalars, taking)
    return norm[0], nonfinite, skip[0]


@custom_op("settle", mutates_args=("scalars",))
def _settle(
    values: Tensor, gram: Tensor, w: Tensor, heads: Tensor, max_norm: float, scalars: Tensor, taking: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if implementation(values) != "triton":
        return reference(values, gram, w, heads, max_norm, scalars, taking)
    from minbert_fast.kernels import settle as kernels

    norm, nonfinite, skip = _made(values)
    length = torch.linalg.vector_norm(heads)
    kernels.settle(values, gram, w.contiguous(), length, max_norm, scalars, taking, norm, nonfinite, skip)
    return norm, nonfinite, skip


def _made(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return values.new_empty(1), torch.empty_like(values, dtype=torch.bool), values.new_empty(1, dtype=torch.bool)


@_settle.register_fake
def _(
    values: Tensor, gram: Tensor, w: Tensor, heads: Tensor, max_norm: float, scalars: Tensor, taking: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _made(values)
