# SPDX-License-Identifier: Apache-2.0
"""What comes next is made while what is there is worked on: batches during a step, rows during their tokenizing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], depth: int = 2) -> Generator[Item, None, None]:
    """Yields `items`, made up to `depth` ahead by a thread; whatever is raised there is raised here.

    The thread ends when the items do, or when this generator is closed (leaving a `for` loop closes it).
    """
    # An item in a list of one, an exception, or None at the end.
    ready: queue.Queue[list[Item] | BaseException | None] = queue.Queue(maxsize=max(1, depth))
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
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        while thread.is_alive():  # perhaps waiting for room
            with suppress(queue.Empty):
                ready.get(timeout=0.01)
