# SPDX-License-Identifier: Apache-2.0
"""Computes the next items in a background thread: batches during a step, rows during tokenization."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")
DEPTH = 2  # items that may wait in the queue


def prefetch(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yields `items`, which a background thread computes ahead. Exceptions of the thread are raised here.

    The thread ends after the last item, or when this generator is closed.
    """
    # An item in a list of length one, an exception, or None at the end.
    ready: queue.Queue[list[Item] | BaseException | None] = queue.Queue(maxsize=DEPTH)
    stop = threading.Event()

    def work() -> None:
        try:
            for item in items:
                ready.put([item])
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        while thread.is_alive():  # it may be blocked on a full queue
            with suppress(queue.Empty):
                ready.get(timeout=0.01)
