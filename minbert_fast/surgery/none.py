# SPDX-License-Identifier: Apache-2.0
"""No surgery: the gradients are added, or averaged.

>>> Equal("mean")(torch.eye(2))
tensor([0.5000, 0.5000])

w_i = 1 for reduction "sum", 1/T for "mean".
"""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.surgery.base import Weights, nonfinite


class Equal(Weights):
    """The same weight for every task."""

    capturable = True

    def __call__(self, gram: Tensor, orders: Tensor | None = None) -> Tensor:
        weight = 1.0 if self.reduction == "sum" else 1.0 / gram.shape[0]
        return torch.where(nonfinite(gram), 0.0, weight).to(gram.dtype)
