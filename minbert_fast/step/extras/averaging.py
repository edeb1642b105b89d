# SPDX-License-Identifier: Apache-2.0
"""A moving average of the weights: `[training] ema`.

With decay d, the average after n steps is a weighted mean of the weights x_1 to x_n after each step. Later weights count
more, and the weights before the first step do not count. The bias correction is Adam's (Kingma & Ba 2014, section 3):

    a_n = (1 - d) / (1 - d^n) * sum over i of d^(n - i) x_i

Each step updates it in one pass over memory: a_n = a_{n-1} + (1 - d) / (1 - d^n) (x_n - a_{n-1}).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minbert_fast.common import huge_pages
from minbert_fast.step.flat import FlatParameters, ParameterSpec
from minbert_fast.step.hooks import StepHook

SUFFIX = "average"


class WeightAverage(StepHook):
    """The average of `values`, tensors that the optimizer changes in place. No method waits for the device.

    `averages` start as copies of `values`. `named` has views of the averages by parameter name, for checkpoints.
    """

    def __init__(
        self, decay: float, values: Sequence[Tensor], averages: Sequence[Tensor], named: Mapping[str, Tensor]
    ) -> None:
        self.decay = decay
        self._values = [value.detach() for value in values]
        self._averages = list(averages)
        self._named = dict(named)
        self._count = torch.zeros((), device=self._values[0].device)  # steps that changed the weights

    @classmethod
    def of_flat(cls, decay: float, flat: FlatParameters) -> WeightAverage:
        """Averages the trainable regions of the flat buffer, in a buffer of the same layout."""
        values = flat.data[: flat.trainable_end]
        average = huge_pages.empty(len(values), device=values.device).copy_(values)
        return cls(decay, [values], [average], {e.name: flat.view(average, e.parameter) for e in flat.trainable})

    @classmethod
    def of_parameters(cls, decay: float, specs: Sequence[ParameterSpec]) -> WeightAverage:
        """Averages parameters that are separate tensors."""
        averages = {e.name: e.parameter.detach().clone() for e in specs}
        return cls(decay, [e.parameter for e in specs], list(averages.values()), averages)

    @torch.no_grad()
    def after_update(self, losses: Tensor, present: Sequence[str], skipped: Tensor) -> None:
        """Adds the weights to the average, unless the step was skipped ([] bool, on the device)."""
        self._count += ~skipped
        share = (1.0 - self.decay) / -torch.expm1(self._count * math.log(self.decay))
        share = torch.where(skipped, 0.0, share)
        for average, value in zip(self._averages, self._values, strict=True):
            average.lerp_(value, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model has the averaged weights; afterwards its own again, bit for bit."""
        kept = [value.clone() for value in self._values]
        self.adopt()
        try:
            yield
        finally:
            for value, own in zip(self._values, kept, strict=True):
                value.copy_(own)

    def adopt(self) -> None:
        """Replaces the model's weights by the average."""
        for value, average in zip(self._values, self._averages, strict=True):
            value.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        tensors = {f"{name}/{SUFFIX}": view for name, view in self._named.items()}
        return tensors | {f"{SUFFIX}/count": self._count}
