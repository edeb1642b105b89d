# SPDX-License-Identifier: Apache-2.0
"""Exceptions that end a run with one line for the user and an exit status."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError


class RunError(Exception):
    """A run cannot start or continue; the message is one line for the user."""

    status = 1


class InterruptError(RunError):
    """SIGTERM or Ctrl-C stopped the run. The exit status is the shell's: 128 + signal number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number

    @property
    def signal_name(self) -> str:
        """The signal's name for a message."""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


def first_line(error: BaseException) -> str:
    """The first line of the message of another library's error; the error's class if it has no message."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, in GPU memory (torch.OutOfMemoryError) or main memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error) or "out of memory" in str(error)


@contextmanager
def translate_write_errors(path: Path) -> Iterator[None]:
    """Turns a write error inside the block into a RunError: one line with `path` and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
