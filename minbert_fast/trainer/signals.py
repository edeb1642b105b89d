# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: the first one lets the current step finish and be saved, a second one ends the process at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from minbert_fast.common.errors import InterruptError

ECHO = 1.0  # seconds: a second Ctrl-C within them is the first, sent by the terminal and passed on by torchrun


class StopSignals:
    """Inside the `with` block, stores the first signal in `received` and restores the old handlers for a second one.

    Inside `interruptible()`, for work that can be abandoned (reading data, an evaluation), the first signal raises
    InterruptError at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0  # when it was received
        self._raise = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # a second Ctrl-C
            if time.monotonic() - self._since >= ECHO:
                self.__exit__()
                signal.raise_signal(number)
            return
        self.received, self._since = number, time.monotonic()
        kept = {n: h for n, h in self._previous.items() if n == number == signal.SIGINT}
        for other in self._previous.keys() - kept.keys():
            signal.signal(other, self._previous[other])
        self._previous = kept
        if self._raise:
            raise InterruptError(number, "interrupted")

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises InterruptError for a signal inside the block, or at its start for one received before.

        A library that is called in the block, and raises another error or none instead, does not hide the signal.
        """
        if self.received is not None:
            raise InterruptError(self.received, "interrupted")
        self._raise = True
        try:
            yield
        except Exception:
            if self.received is None:
                raise
        finally:
            self._raise = False
        if self.received is not None:
            raise InterruptError(self.received, "interrupted")
