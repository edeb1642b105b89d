# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a pure function of the step: linear warm-up, then one of four schedules.

Of n steps, w are warm-up. Step s = 0, 1, ... has the factor (s + 1) / (w + 1) while s < w. After that, with
x = (s - w) / (n - w) in [0, 1), the factor is:

    linear       1 - x                          (the schedule of the course and of transformers)
    cosine       (1 + cos(pi x)) / 2            (Loshchilov & Hutter 2017, one cycle)
    exponential  gamma ** (finished epochs)     (torch's ExponentialLR, stepped once an epoch)
    constant     1
"""

from __future__ import annotations

import math

from minbert_fast.recipes.sections import OptimizerOptions


def lr_scale(step: int, total_steps: int, steps_per_epoch: int, options: OptimizerOptions) -> float:
    """The factor of all base learning rates at `step` (0-based) of a stage.

    `total_steps` is the length of the stage, even if `--stop-after` cuts the run short: a resumed run then has the
    learning rates of an uninterrupted one.
    """
    assert step >= 0, f"step {step}"
    warmup = round(options.warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    if options.schedule == "linear":
        return 1.0 - progress
    if options.schedule == "cosine":
        return (1.0 + math.cos(math.pi * progress)) / 2.0
    if options.schedule == "exponential":
        return options.gamma ** (step // max(steps_per_epoch, 1))
    return 1.0
