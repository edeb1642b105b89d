# SPDX-License-Identifier: Apache-2.0
"""A moving average of the weights beside the weights themselves: `[training] ema`.

With decay d, the average after n steps is the mean of the weights after each of them, x_1 to x_n, the last ones counting
most (bias-corrected as Adam's moments are, Kingma & Ba 2014, section 3; the weights before the first step do not count):

    a_n = (1 - d) / (1 - d^n) * sum over i of d^(n - i) x_i

It is kept in that form, one pass over memory a step: a_n = a_{n-1} + (1 - d) / (1 - d^n) (x_n - a_{n-1}).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minbert_fast.common import huge_pages
from minbert_fast.step.flat import Entry, FlatParameters
from minbert_fast.step.hooks import StepHook

SUFFIX = "average"


class WeightAverage(StepHook):
    """The average of `values`, tensors that the optimizer changes in place; nothing here waits for the device.

    `averages` start as copies of them; `named` are views of the averages by parameter name, which is how a checkpoint
    has them, wherever a buffer puts them.
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
    def of_flat(cls, decay: float, flat: FlatParameters) -> WeightAverage | None:
        """Of the flat buffer's trainable regions, in a buffer of the same layout. None where decay is 0."""
        if not decay:
            return None
        values = flat.data[: flat.trainable_end]
        average = huge_pages.empty(len(values), device=values.device).copy_(values)
        return cls(decay, [values], [average], {e.name: flat.view(average, e.parameter) for e in flat.trainable})

    @classmethod
    def of_entries(cls, decay: float, entries: Sequence[Entry]) -> WeightAverage | None:
        """Of parameters that each have a memory of their own. None where decay is 0."""
        if not decay:
            return None
        averages = {e.name: e.parameter.detach().clone() for e in entries}
        return cls(decay, [e.parameter for e in entries], list(averages.values()), averages)

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
        """The model has the averaged weights inside, and its own again afterwards, bit for bit."""
        kept = [value.clone() for value in self._values]
        self.adopt()
        try:
            yield
        finally:
            for value, own in zip(self._values, kept, strict=True):
                value.copy_(own)

    def adopt(self) -> None:
        """The model has the averaged weights from now on: what its training comes to."""
        for value, average in zip(self._values, self._averages, strict=True):
            value.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        tensors = {f"{name}/{SUFFIX}": view for name, view in self._named.items()}
        return tensors | {f"{SUFFIX}/count": self._count}

    def load_state_dict(self, tensors: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave; other tensors are passed over. Raises ValueError where one is missing."""
        for name, view in self._named.items():
            found = tensors.get(f"{name}/{SUFFIX}")
            if found is None or found.shape != view.shape:
                raise ValueError(f"no average for {name} of shape {list(view.shape)}")
            view.copy_(found)
        self._count.copy_(tensors[f"{SUFFIX}/count"])
