# SPDX-License-Identifier: Apache-2.0
"""The processes that train together, and the messages between them.

`torchrun` starts the processes and gives each its rank through the environment. They exchange tensors on a GPU through NCCL,
and everything else, also beside GPUs, through gloo: no message about the run makes a process wait for its GPU. A process
that loses the others ends with one line; torchrun then ends the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import AllreduceCoalescedOptions, ReduceScatterOptions

from minbert_fast.common.errors import InterruptError, RunError, first_line, is_out_of_memory
from minbert_fast.common.schema import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

Result = TypeVar("Result")

PATIENCE = timedelta(hours=2)  # how long the other ranks wait while rank 0 evaluates


@dataclass(frozen=True)
class World:
    """The rank of this process among `size` processes. Only rank 0 writes files and shows progress."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def reduce(self, *tensors: Tensor) -> None:
        """Sums each tensor over all processes, in place; every process ends with the same bits."""
        self.finish([self.begin_sum([tensor]) for tensor in tensors if self.size > 1])

    def begin_sum(self, tensors: Sequence[Tensor]) -> Work | None:
        """Begins to sum contiguous tensors of one dtype over all processes, in place, in one message; `finish` waits."""
        filled = [tensor for tensor in tensors if tensor.numel()]
        with self._lost():
            return _group().allreduce_coalesced(filled, AllreduceCoalescedOptions()) if filled else None

    def begin_share(self, tensors: Sequence[Tensor], shares: Sequence[Tensor]) -> Work | None:
        """Begins to sum each tensor [size * n] over all processes. Rank r gets elements r n to (r + 1) n in its share [n].

        One message for all tensors, which are contiguous and of one dtype.
        """
        filled = [pair for pair in zip(shares, tensors, strict=True) if pair[0].numel()]
        with self._lost():
            if not filled:
                return None
            outputs, inputs = map(list, zip(*filled, strict=True))
            return _group().reduce_scatter_tensor_coalesced(outputs, inputs, ReduceScatterOptions())

    def begin_union(self, share: Tensor, tensor: Tensor) -> Work | None:
        """Begins to fill `tensor` [size * n] with the `share` [n] of every process, in the order of their ranks."""
        with self._lost():
            work: Work = distributed.all_gather(list(tensor.chunk(self.size)), share, async_op=True)
        return work

    def finish(self, begun: Iterable[Work | None]) -> None:
        """Waits for operations that a `begin_` method returned. On a GPU the current stream waits, not the host."""
        with self._lost():
            for work in begun:
                if work is not None:
                    work.wait()

    def wait(self) -> None:
        """Waits until every process has called it."""
        if self.size > 1:
            with self._lost():
                distributed.barrier()

    def begin_largest(self, numbers: Tensor) -> Work | None:
        """Begins to replace numbers on the CPU by the largest of all processes; `finish` waits for it."""
        with self._lost():
            work: Work = distributed.all_reduce(numbers, distributed.ReduceOp.MAX, async_op=True)
        return work

    def every(self, value: Any) -> list[Any]:
        """Returns, in every process, the `value` of each process in the order of their ranks. Plain data only."""
        found = [value] * self.size
        if self.size > 1:
            with self._lost():
                distributed.all_gather_object(found, value)
        return found

    def from_main(self, make: Callable[[], Result]) -> Result:
        """Returns, in every process, the result of `make` on rank 0. Only rank 0 calls `make`. Plain data only.

        Every process raises an InterruptError that rank 0 raises.
        """
        if self.size == 1:
            return make()
        stopped: InterruptError | None = None
        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = make()
            except InterruptError as error:
                stopped, message[1] = error, error.number
        with self._lost():
            distributed.broadcast_object_list(message, src=0)
        if stopped is not None:
            raise stopped
        if message[1] is not None:
            raise InterruptError(message[1], "rank 0 was stopped")
        result: Result = message[0]
        return result

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RunError(f"rank {self.rank} of {self.size} lost another process ({first_line(error)})") from error


class Agreement:
    """The largest number of all processes, one call late: a call starts a message and returns the result of the last one.

    The message travels during a step, so no process waits for it between two steps.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = torch.zeros(1, dtype=torch.int64)
        self._begun: Work | None = None

    def __call__(self, number: int | None) -> int | None:
        """The largest `number` that a process gave to its call before this one (to this one, in a world of one)."""
        if self._world.size == 1:
            return number
        self._world.finish([self._begun])
        largest = int(self._number)
        self._number.fill_(number or 0)
        self._begun = self._world.begin_largest(self._number)
        return largest or None


def _group() -> ProcessGroup:
    group = distributed.group.WORLD
    assert group is not None
    return group


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes that torchrun started, and this process's device. Without torchrun, a world of one process.

    Raises ConfigError for environment variables that are no numbers, and for a rank without a GPU.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # graphs are captured on streams of the current device
        yield World(), device
        return
    rank, local = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank} has no GPU of its own: {torch.cuda.device_count()} here, it needs number {local}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    world = World(rank, size)
    with world._lost():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield world, device
    finally:
        distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name} = {text!r} in the environment: expected a number, as torchrun sets it")
    return int(text)
