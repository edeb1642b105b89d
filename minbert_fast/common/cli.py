# SPDX-License-Identifier: Apache-2.0
"""What all entry points share: a user's mistake is one line and an exit status, never a traceback.

Exit status: 0 done; 1 the run failed (disk, memory, ...); 2 a mistake in flags, recipe, data or model files;
128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from minbert_fast.common.errors import RunError
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.version import __version__

TRACEBACK = "MINBERT_FAST_TRACEBACK"  # set it to see where an error came from


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. Abbreviated flags are refused: a new flag would change them."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(
            prog=f"python -m minbert_fast.{module}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"minbert_fast {__version__}")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # argparse overloads it
        """As argparse does it, but a flag that does not exist brings the nearest one to mind."""
        found, unknown = self.parse_known_args(args, namespace)
        flags = [flag for flag in unknown if flag.startswith("--")]
        for flag in flags[:1]:
            close = difflib.get_close_matches(flag.partition("=")[0], self._option_string_actions, n=1)
            if close:
                self.error(f"unrecognized arguments: {' '.join(unknown)}; did you mean {close[0]}?")
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage and leaving."""
        raise ConfigError(f"{message} (--help lists the flags)")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --device and --precision."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default: auto)")


def count(text: str) -> int:
    """A flag's value as a whole number, 0 or more. Raises argparse.ArgumentTypeError."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 or more")
    return int(text)


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs an entry point's `main(arguments)` (default: the command line's) and returns the exit status.

    ValueErrors (ConfigError and DataError among them), failures of the file system and of a run become one line on
    standard error; anything else is a bug and keeps its traceback.
    """
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # takes any arguments
    try:
        main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RunError as error:
        return _fail(error, str(error), error.status)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 128 + signal.SIGINT)
    except ValueError as error:
        return _fail(error, str(error), 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(error, f"{place}{error.strerror or error}", 1)
    return 0


def _fail(error: BaseException, message: str, status: int) -> int:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    line = " ".join(message.split()) or "failed without a message"
    print(f"{'error' if status < 128 else 'stopped'}: {line}", file=sys.stderr, flush=True)
    return status


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
