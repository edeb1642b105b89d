# SPDX-License-Identifier: Apache-2.0
"""What a person watching the run sees: a bar on a terminal, a line now and then elsewhere, nothing on other ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Protocol

from tqdm import tqdm

LINE_SECONDS = 15.0  # between progress lines where there is no terminal


class Progress(Protocol):
    """Follows a run step by step. What comes before the first step (an evaluation) counts for no step's time."""

    def advance(self, steps: int, losses: Mapping[str, float] | None, tokens_per_second: float) -> None:
        """After `steps` more steps; `losses` are new ones, if any were fetched."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """The run is over."""


class Bar:
    """A tqdm bar with losses and tokens a second; it adds time taken and time left itself."""

    def __init__(self, done: int, total: int) -> None:
        self._bar = tqdm(initial=done, total=total, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self, steps: int, losses: Mapping[str, float] | None, tokens_per_second: float) -> None:
        if losses is not None:
            self._bar.set_postfix_str(_shown(losses, tokens_per_second), refresh=False)
        self._bar.update(steps)

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()
        if self._bar.n == self._bar.initial:
            self._bar.unpause()

    def close(self) -> None:
        self._bar.close()


class Lines:
    """The same as a line every `LINE_SECONDS`, for log files."""

    def __init__(self, done: int, total: int) -> None:
        self._done, self._total, self._begun = done, total, done
        self._start = self._last = time.monotonic()
        self._losses: Mapping[str, float] = {}

    def advance(self, steps: int, losses: Mapping[str, float] | None, tokens_per_second: float) -> None:
        self._done += steps
        self._losses = self._losses if losses is None else losses
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            left = (now - self._start) / max(self._done - self._begun, 1) * (self._total - self._done)
            self.say(f"step {self._done}/{self._total}, {left:.0f} s left: {_shown(self._losses, tokens_per_second)}")

    def say(self, line: str) -> None:
        print(line, flush=True)
        if self._done == self._begun:
            self._start = self._last = time.monotonic()

    def close(self) -> None:
        pass


class Silent:
    """Shows nothing."""

    def advance(self, steps: int, losses: Mapping[str, float] | None, tokens_per_second: float) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


class FileProgress:
    """How far a file has been tokenized: a bar on a terminal, elsewhere a line every `LINE_SECONDS`.

    Call it with the rows done, the bytes done and the file's bytes. Use as a context manager.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: tqdm | None = None
        self._start = self._last = time.monotonic()

    def __call__(self, rows: int, done: int, size: int) -> None:
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=size, unit="B", unit_scale=True, desc=self.name, leave=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            left = (now - self._start) / max(done, 1) * (size - done)
            print(f"{self.name}: {rows:,} rows tokenized, {done / max(size, 1):.0%}, {left:.0f} s left", flush=True)

    def __enter__(self) -> FileProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def progress_for(done: int, total: int, visible: bool) -> Progress:
    """The display that fits where standard error goes."""
    if not visible:
        return Silent()
    return Bar(done, total) if sys.stderr.isatty() else Lines(done, total)


def _shown(losses: Mapping[str, float], tokens_per_second: float) -> str:
    parts = [f"{name} {loss:.3f}" for name, loss in losses.items()]
    return ", ".join([*parts, f"{tokens_per_second:,.0f} tokens/s"])
