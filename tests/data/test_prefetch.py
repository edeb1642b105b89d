# SPDX-License-Identifier: Apache-2.0
"""Prefetched items: in order, computed ahead in another thread, with the thread's exceptions, and no thread left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from minbert_fast.data.prefetch import DEPTH, prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(prefetch(range(20))) == list(range(20))
    assert list(prefetch([])) == []
    assert not threads()


def test_an_exception_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise OSError("disk full")

    found: list[int] = []
    with pytest.raises(OSError, match="disk full"):
        found.extend(prefetch(items()))
    assert found == list(range(5))
    assert not threads()


def test_closing_ends_the_thread_of_an_endless_iterable() -> None:
    made = []

    def items() -> Iterator[int]:
        while True:
            made.append(threading.current_thread())
            yield len(made)

    ahead = prefetch(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    ahead.close()
    assert not threads()
    assert len(made) <= 2 + DEPTH
    assert threading.main_thread() not in made
