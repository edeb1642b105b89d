# SPDX-License-Identifier: Apache-2.0
"""Computes the next items in a background thread: batches during a step, rows during tokenization."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
DEPTH = 3  # items that are computed ahead


def prefetch(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yields `items`, which a background thread computes ahead. Exceptions of the thread are raised here.

    The thread ends after the last item, or when this generator is closed.
    """
    end: Any = object()
    iterator, pool = iter(items), ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(next, iterator, end) for _ in range(DEPTH))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, iterator, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
