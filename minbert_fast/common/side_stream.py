# SPDX-License-Identifier: Apache-2.0
"""A second stream for launches that do not depend on each other, where it is free: under graph capture."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


@functools.cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextmanager
def forked(device: torch.device) -> Iterator[AbstractContextManager[Any]]:
    """Yields a context: what is launched in it runs beside what is launched in the rest of the block.

    The block's end waits for both. Both must write to different memory, and allocate none. Eagerly, the second stream's
    events would cost the host more than the device gains: everything then runs in order.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield nullcontext()
        return
    current = torch.cuda.current_stream(device)
    side = _stream(current.device_index)
    side.wait_stream(current)
    yield torch.cuda.stream(side)
    current.wait_stream(side)
