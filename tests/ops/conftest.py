# SPDX-License-Identifier: Apache-2.0
"""Each op on each of its floors: PyTorch, the C++ extension, Triton. Outputs start as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minbert_fast import _C
from minbert_fast.ops import backend
from tests.tolerance import poisoned_memory

ISAS = _C.isas().split()


def running(floor: str) -> Iterator[torch.device]:
    """Runs ops by the floor (`native avx2` names an instruction set) inside; yields the device of their tensors.

    Triton's kernels run on the GPU where there is one, else in the interpreter (tests/conftest.py).
    """
    name, _, isa = floor.partition(" ")
    if name == "triton" and not backend.triton_available():
        pytest.skip("Triton is not installed")
    before = _C.isa()
    if isa:
        _C.set_isa(isa)
    with backend.force(name), poisoned_memory():  # type: ignore[arg-type]
        yield torch.device("cuda" if name == "triton" and torch.cuda.is_available() else "cpu")
    _C.set_isa(before)


@pytest.fixture(params=["torch", "native", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """One test per implementation; the extension uses the processor's best instruction set."""
    yield from running(request.param)


@pytest.fixture(params=["torch", *(f"native {isa}" for isa in ISAS), "triton"])
def every_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """One test per implementation, and one per instruction set of the extension."""
    yield from running(request.param)


@pytest.fixture(params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """One test per implementation with hand-written kernels."""
    yield from running(request.param)


@pytest.fixture
def native() -> Iterator[torch.device]:
    """The extension alone."""
    yield from running("native")


@pytest.fixture
def triton() -> Iterator[torch.device]:
    """Triton alone."""
    yield from running("triton")
