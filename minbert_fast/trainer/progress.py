# SPDX-License-Identifier: Apache-2.0
"""Progress for the person who watches a run: a bar on a terminal or in a notebook, elsewhere a line every 15 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

LINE_SECONDS = 15.0  # between printed lines where standard error is no terminal


def notebook_bar() -> type[tqdm] | None:
    """tqdm's widget, if this process runs in a notebook that shows widgets."""
    from tqdm.auto import tqdm as found  # looks for a notebook when it is imported

    return found if any(base.__module__ == "tqdm.notebook" for base in found.__mro__) else None


class Progress:
    """Shows the steps, losses and tokens per second of a run; prints nothing unless `visible`.

    The time left is estimated from the steps alone: an evaluation before the first step does not count.
    """

    def __init__(self, done: int, total: int, visible: bool = True) -> None:
        self._visible = visible
        bar = notebook_bar()
        hidden = None if bar is None else False  # None: hidden unless standard error is a terminal
        self._bar = (bar or tqdm)(
            initial=done, total=total, unit="step", dynamic_ncols=True, disable=hidden if visible else True
        )
        self._begin, self._done, self._total = done, done, total
        self._start = self._last = time.monotonic()
        self._losses: Mapping[str, float] = {}

    def advance(self, losses: Mapping[str, float] | None, tokens_per_second: float) -> None:
        """Counts one more step. `losses` replace those shown; None keeps them."""
        self._done += 1
        if losses is not None:
            self._losses = losses
            self._bar.set_postfix_str(self._describe(tokens_per_second), refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._visible and self._bar.disable and now - self._last >= LINE_SECONDS:
            self._last = now
            left = (now - self._start) / (self._done - self._begin) * (self._total - self._done)
            self.say(f"step {self._done}/{self._total}, {left:.0f} s left: {self._describe(tokens_per_second)}")

    def say(self, line: str) -> None:
        """Prints a line on standard output, above the bar."""
        if self._visible:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        if self._done == self._begin:
            self._bar.unpause()
            self._start = self._last = time.monotonic()

    def close(self) -> None:
        self._bar.close()

    def _describe(self, tokens_per_second: float) -> str:
        losses = (f"{name} {loss:.3f}" for name, loss in self._losses.items())
        return ", ".join([*losses, f"{tokens_per_second:,.0f} tokens/s"])


@contextmanager
def file_progress(name: str) -> Iterator[Callable[[int, int, int], None]]:
    """Shows how far file `name` is tokenized, through calls of (rows done, bytes done, bytes of the file)."""
    start = last = time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc=name, leave=False, disable=None, delay=0.5, file=sys.stderr) as bar:

        def show(rows: int, done: int, size: int) -> None:
            nonlocal last
            now = time.monotonic()
            if not bar.disable:
                bar.total = size
                bar.update(done - bar.n)
            elif now - last >= LINE_SECONDS:
                last = now
                left = (now - start) / max(done, 1) * (size - done)
                print(f"{name}: {rows:,} rows tokenized, {done / max(size, 1):.0%}, {left:.0f} s left", flush=True)

        yield show
