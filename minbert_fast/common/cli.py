# SPDX-License-Identifier: Apache-2.0
"""Shared by all commands: a user's mistake prints one line and sets the exit status; it never shows a traceback.

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

TRACEBACK = "MINBERT_FAST_TRACEBACK"  # environment variable: if set, errors print their traceback too


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. It refuses abbreviated flags: a new flag could change their meaning."""

    def __init__(self, module: str, description: str) -> None:
        super().__init__(
            prog=f"python -m minbert_fast.{module}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action="version", version=f"minbert_fast {__version__}")

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # argparse overloads it
        """Like argparse, but the error for an unknown flag suggests the closest known one."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((flag for flag in unknown if flag.startswith("--")), "")
            close = difflib.get_close_matches(flag.partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError. argparse would print the usage and exit."""
        raise ConfigError(f"{message} (--help lists the flags)")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default: auto)")


def whole_number(text: str) -> int:
    """The `type` of a flag that takes a whole number, 0 or more. Raises argparse.ArgumentTypeError."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 or more")
    return int(text)


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command's `main(arguments)` and returns the exit status. `arguments` default to sys.argv[1:].

    ValueError (such as ConfigError and DataError), OSError and RunError become one line on standard error. Any other
    exception is a bug and keeps its traceback.
    """
    warnings.showwarning = _show_warning  # type: ignore[assignment]  # takes any arguments
    try:
        main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has exited, as in `... | head`
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
