# SPDX-License-Identifier: Apache-2.0
"""Kernel tests: on a GPU as compiled, elsewhere in Triton's interpreter (tests/conftest.py); outputs start as NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.tolerance import poisoned_memory


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run: the GPU where there is one, else the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield
