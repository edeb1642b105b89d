# SPDX-License-Identifier: Apache-2.0
"""How a run ends other than by finishing: one line for the user and an exit status."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class RunError(Exception):
    """A run cannot start or go on; the message is one line for the user."""

    status = 1


class InterruptError(RunError):
    """SIGTERM or Ctrl-C stopped the run; the exit status is the shell's: 128 + signal number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        self.status = 128 + number

    @property
    def signal_name(self) -> str:
        """The signal as people call it."""
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure of the file system inside the block into one line that names `path` and the reason.

    Raises RunError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    except SafetensorError as error:
        raise RunError(f"{path}: cannot be written ({error})") from error
