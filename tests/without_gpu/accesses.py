# SPDX-License-Identifier: Apache-2.0
"""Shows in Triton's interpreter what memcheck and racecheck show on a GPU: addresses out of bounds, and races.

The interpreter runs the programs of a launch one after another, and reads and writes any address, so it hides such faults.
`check_accesses` makes it raise AccessError unless, in every launch,

- every address that is read or written belongs to an element of a tensor that was passed to the launch;
- no program reads or writes what another program of the launch writes, and none reads what it wrote itself without a
  barrier between: one thread wrote it, another one may read it;
- every `tl.multiple_of` is true.

A tensor reaches from its first element to its last one, and the gaps of a strided view do not belong to it. Where a kernel
finds tensors by a table of addresses, they are those that its launcher has. Atomics would order accesses in ways that this
module does not follow; kernels that use them are refused.
"""

from __future__ import annotations

import bisect
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

#: Called with each launch that ended, for tests that compare launches.
listeners: list[Callable[[Launch], None]] = []


class AccessError(Exception):
    """A fault that a GPU would not forgive. It names kernel, program, and the place in a tensor."""


class Access(NamedTuple):
    """What one load or store of one program touches."""

    writes: bool
    program: int
    epoch: int  # grows with each barrier
    addresses: np.ndarray
    size: int  # bytes of an element


@dataclass
class Region:
    """Memory of a tensor, or of tensors that overlap, and the accesses of a launch to it."""

    begin: int
    end: int
    tensors: list[tuple[str, Tensor]]
    accesses: list[Access] = field(default_factory=list)

    @cached_property
    def unit(self) -> int:
        """Bytes of the smallest element."""
        return min(tensor.element_size() for _, tensor in self.tensors)

    @cached_property
    def owned(self) -> np.ndarray | None:
        """For each unit whether it belongs to a tensor. None: all do."""
        if len(self.tensors) == 1 and self.tensors[0][1].is_contiguous():
            return None
        owned = np.zeros((self.end - self.begin) // self.unit, bool)
        for _, tensor in self.tensors:
            units = tensor.element_size() // self.unit
            first = owned[(tensor.data_ptr() - self.begin) // self.unit :]
            strides = (*(stride * units for stride in tensor.stride()), 1)
            np.lib.stride_tricks.as_strided(first, (*tensor.shape, units), strides)[...] = True
        return owned

    def units(self, access: Access) -> np.ndarray:
        """The numbers of the units that are touched."""
        first = (access.addresses - np.uint64(self.begin)).astype(np.int64) // self.unit
        return first if access.size <= self.unit else np.add.outer(first, np.arange(access.size // self.unit)).ravel()


class Launch:
    """One launch: its tensors by their parameters' names, and what its programs touch."""

    def __init__(self, kernel: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self.kernel = kernel
        self.regions: list[Region] = []
        for name, tensor in sorted((t for t in tensors if t[1].numel()), key=lambda named: named[1].data_ptr()):
            begin, end = extent(tensor)
            if self.regions and begin < self.regions[-1].end:
                self.regions[-1].tensors.append((name, tensor))
                self.regions[-1].end = max(end, self.regions[-1].end)
            else:
                self.regions.append(Region(begin, end, [(name, tensor)]))
        self.begins = [region.begin for region in self.regions]
        self.programs: dict[tuple[int, ...], int] = {}
        self.epoch = 0

    def touch(self, writes: bool, program: tuple[int, ...], pointers: Any, mask: Any) -> None:
        """Notes a load or a store. Raises AccessError for an address that is no tensor's."""
        addresses = pointers.data[mask.data]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        access = Access(writes, self.programs.setdefault(program, len(self.programs)), self.epoch, addresses, size)
        region = self.regions[max(0, bisect.bisect_right(self.begins, int(addresses.min())) - 1)]
        inside = (addresses >= region.begin) & (addresses + np.uint64(size) <= region.end)
        if region.owned is not None and inside.all():
            inside = region.owned[region.units(access)].reshape(addresses.size, -1).all(1)
        if not inside.all():
            raise AccessError(f"{self._says(access)} out of bounds: {self._place(int(addresses[~inside][0]))}")
        region.accesses.append(access)

    def check_races(self) -> None:
        """Raises AccessError where a program touches what another one writes, or reads its own without a barrier."""
        for region in self.regions:
            if not any(access.writes for access in region.accesses):
                continue
            writer, written = np.full((2, (region.end - region.begin) // region.unit), -1)
            for access in region.accesses:
                units = region.units(access)
                before = writer[units]
                if access.writes:
                    self._refuse(access, units, region, before, (before >= 0) & (before != access.program), "writes")
                    writer[units], written[units] = access.program, access.epoch
                else:
                    own = (before == access.program) & (written[units] == access.epoch)
                    self._refuse(access, units, region, before, own, "wrote, without a barrier")
            for access in region.accesses:
                units = region.units(access)
                other = writer[units]
                self._refuse(access, units, region, other, (other >= 0) & (other != access.program), "writes")

    def _refuse(
        self, access: Access, units: np.ndarray, region: Region, writers: np.ndarray, wrong: np.ndarray, did: str
    ) -> None:
        if wrong.any():
            first = int(wrong.argmax())
            place = self._place(region.begin + int(units[first]) * region.unit)
            raise AccessError(f"{self._says(access)} that program {list(self.programs)[writers[first]]} {did}: {place}")

    def _says(self, access: Access) -> str:
        program = list(self.programs)[access.program]
        return f"{self.kernel}: program {program} {'writes' if access.writes else 'reads'} {access.size} bytes"

    def _place(self, address: int) -> str:
        def far(named: tuple[str, Tensor]) -> tuple[int, int]:
            begin, end = extent(named[1])
            return max(begin - address, address - end + 1, 0), abs(address - begin)

        name, tensor = min((named for region in self.regions for named in region.tensors), key=far)
        shape = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}, strides {list(tensor.stride())}"
        return f"byte {address - tensor.data_ptr()} of {name} ({shape})"


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the one behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def tensors_of_launcher() -> list[tuple[str, Tensor]]:
    """The tensors among the variables of the function of `minbert_fast.kernels` that launches."""
    frame = sys._getframe()
    while frame.f_back is not None and not frame.f_globals["__name__"].startswith("minbert_fast.kernels."):
        frame = frame.f_back
    leaves = tree_leaves(list(frame.f_locals.values()))
    return [(f"tensor {i} of the table", leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]


def check_accesses() -> None:
    """From here on every launch in Triton's interpreter is checked. Raises ImportError without Triton."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    execute, patch_core = executor.__call__, interpreter._patch_lang_core
    current: list[Launch] = []

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        current[-1].touch(False, self.grid_idx, pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].touch(True, self.grid_idx, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def barrier(self: Any) -> None:
        current[-1].epoch += 1

    def refuse(self: Any, *arguments: Any) -> Any:
        raise AccessError(f"{current[-1].kernel}: an atomic")

    def checked_execute(self: Any, *arguments: Any, **keywords: Any) -> None:
        passed = [*zip(self.arg_names, arguments, strict=False), *keywords.items()]
        bases = [(name, getattr(value, "base", value)) for name, value in passed]  # the base of a tensor's descriptor
        tensors = [(name, base) for name, base in bases if isinstance(base, Tensor)]
        if "table_ptr" in self.arg_names:
            tensors += tensors_of_launcher()
        launch = Launch(self.fn.__name__, tensors)
        current.append(launch)
        try:
            with _disable_current_modes():
                execute(self, *arguments, **keywords)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, AccessError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None
        finally:
            current.pop()
        launch.check_races()
        for listener in listeners:
            listener(launch)

    def checked_core(language: Any, scope: Any) -> None:
        patch_core(language, scope)
        original = language.multiple_of

        def multiple_of(value: Any, divisor: Any) -> Any:
            number = getattr(divisor, "value", divisor)
            if isinstance(value, language.tensor) and any(int(each) % number for each in value.handle.data.flat):
                raise AccessError(f"{current[-1].kernel}: {value} is no multiple of {number}")
            return original(value, divisor)

        scope.set_attr(language, "multiple_of", multiple_of)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_barrier = barrier
    for name in [name for name in vars(builder) if name.startswith("create_atomic")]:
        setattr(builder, name, refuse)
    executor.__call__, interpreter._patch_lang_core = checked_execute, checked_core
