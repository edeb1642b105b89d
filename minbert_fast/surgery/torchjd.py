# SPDX-License-Identifier: Apache-2.0
"""TorchJD's weightings of Gram matrices as methods of ours.

>>> from torchjd.aggregation import MGDAWeighting
>>> FromTorchJD(MGDAWeighting())(torch.eye(2))
tensor([0.5000, 0.5000])
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minbert_fast.surgery.base import Stateless, nonfinite


class FromTorchJD(Stateless):
    """A TorchJD `Weighting`, or any other callable from G to w. It may wait for the device.

    The weights are used as the callable gives them: no reduction is applied.
    """

    def __init__(self, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weighting = weighting

    def __call__(self, gram: Tensor) -> Tensor:
        used = ~nonfinite(gram)
        w = torch.zeros_like(gram[0])
        if used.any():
            w[used] = self.weighting(gram[used][:, used]).to(w)
        return w
