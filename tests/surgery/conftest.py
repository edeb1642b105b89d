# SPDX-License-Identifier: Apache-2.0
"""Where surgery is tested: the CPU, and a GPU where there is one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param, 0 if request.param == "cuda" else None)
