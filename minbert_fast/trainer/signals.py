# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: finish the step at hand, save, say so. A second one ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from minbert_fast.common.errors import InterruptError


class StopSignals:
    """Inside the `with` block, the first signal is noted in `received`; the handlers are put back for a second one.

    In an `interruptible()` section (one without effects to complete, such as reading data or an evaluation) the first
    signal raises InterruptError right there instead.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._raise = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self._raise:
            raise InterruptError(number, "interrupted")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A section that a signal may leave at any point; a signal noted before it ends the section at its start."""
        if self.received is not None:
            raise InterruptError(self.received, "interrupted")
        self._raise = True
        try:
            yield
        finally:
            self._raise = False
