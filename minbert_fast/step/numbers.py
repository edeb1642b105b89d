# SPDX-License-Identifier: Apache-2.0
"""The numbers that the host chooses for each step: seed, learning rate, task orders."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

_HEAD = struct.Struct("=qf4x")  # seed, rate, padding
_ORDERS = 4  # where the orders begin, in elements of the buffer


class StepNumbers:
    """One int32 buffer on the device, which `write` fills by one copy. A captured graph reads it. T tasks."""

    def __init__(self, tasks: int, device: torch.device) -> None:
        self._buffer = torch.zeros(_ORDERS + tasks * tasks, dtype=torch.int32, device=device)
        self.seed = self._buffer[:2].view(torch.int64)  # [1]
        self.rate = self._buffer[2:3].view(torch.float32)  # [1] learning rate
        self.orders = self._buffer[_ORDERS:].view(tasks, tasks)  # as `Weights.draw` returns them

    def write(self, seed: int, rate: float, orders: Tensor | None) -> None:
        """Sets the numbers of the next step, without waiting for the device. `orders` None: the method draws none."""
        # New memory in each step: an earlier copy may still be under way.
        host = torch.zeros(self._buffer.shape, dtype=torch.int32, pin_memory=self._buffer.device.type == "cuda")
        _HEAD.pack_into(host.numpy().data, 0, seed, rate)
        if orders is not None:
            host[_ORDERS:] = orders.flatten()
        self._buffer.copy_(host, non_blocking=True)


def seed_of(seed: int, step: int) -> int:
    """The seed of a step, from the run's seed."""
    return (seed * 1_000_003 + step) % 2**62


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of the CPU and of `device`.

    `torch.manual_seed` also notes the seed for each kind of device that is not in use, with a formatted traceback.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
