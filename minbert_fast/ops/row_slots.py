# SPDX-License-Identifier: Apache-2.0
"""Which gradient row each row of a table has: the inverse of a list of row numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from minbert_fast.ops.backend import implementation
from minbert_fast.ops.library import custom_op


def reference(ids: Tensor, slots: Tensor) -> None:
    """In plain PyTorch; -1 in `ids` lands in the last, spare slot."""
    slots.fill_(-1)
    slots[ids.long()] = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)


@custom_op("row_slots", mutates_args=("slots",))
def row_slots(ids: Tensor, slots: Tensor) -> None:
    """ids int32 [U], ascending, then -1 -> slots int32 [V + 1]: slots[:V] is where each row stands in ids, or -1."""
    if implementation(ids) == "triton":
        from minbert_fast.kernels import row_slots as kernels

        kernels.row_slots(ids, slots[:-1])
    else:
        reference(ids, slots)
