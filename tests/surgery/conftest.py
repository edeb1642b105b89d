# SPDX-License-Identifier: Apache-2.0
"""Where surgery is tested: every instruction set of this processor, any number of threads, a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minbert_fast import _C


@pytest.fixture(params=_C.isas().split())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0 if request.param == "cuda" else None)
