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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from minbert_fast.common.errors import RunError
from minbert_fast.common.imports import ImportAction
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.version import __version__

SCRIPT = "minbert-fast"  # the installed command
TRACEBACK = "MINBERT_FAST_TRACEBACK"  # environment variable: if set, errors print their traceback too


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line. It refuses abbreviated flags: a new flag could change their meaning."""

    def __init__(self, module: str, description: str, usage: str | None = None) -> None:
        installed = Path(sys.argv[0]).name == SCRIPT
        super().__init__(
            prog=f"{SCRIPT} {module}" if installed else f"python -m minbert_fast.{module}",
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=25),
        )
        self.add_argument("--version", action="version", version=f"minbert_fast {__version__}")

    def add_hidden_group(self, title: str, flag: str) -> argparse._ArgumentGroup:
        """A group of flags that --help leaves out; `flag` prints it."""
        group = self.add_argument_group(title)
        self._action_groups.remove(group)  # read by the help text alone
        self.add_argument(flag, action=_GroupHelp, const=group, help=f"show {title}")
        return group

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]  # argparse overloads it
        """Like argparse, but the error for an unknown flag suggests the closest known one."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((flag for flag in unknown if flag.startswith("--")), "")
            hint = did_you_mean(flag.partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError. argparse would print the usage and exit."""
        raise ConfigError(f"{message} (--help lists the flags)")


class _GroupHelp(argparse.Action):
    """Prints the help of one group (`const`) and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: Any, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        formatter = parser._get_formatter()
        formatter.start_section(self.const.title)
        formatter.add_arguments(self.const._group_actions)
        formatter.end_section()
        print(formatter.format_help(), end="")
        parser.exit()


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --import FILE.py, which runs the file where the command line names it; `imports` maps names to digests."""
    text = "run a file that registers tasks of your own"
    parser.add_argument("--import", action=ImportAction, default={}, dest="imports", metavar="FILE.py", help=text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` with the known name closest to `name`; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="(default: auto)")


def whole_number(text: str, smallest: int = 0) -> int:
    """The `type` of a flag that takes a whole number from `smallest` on. Raises argparse.ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {smallest} or more")
    return int(text)


positive_number = partial(whole_number, smallest=1)


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
        return 128 + signal.SIGPIPE
    except RunError as error:
        return _fail(error, str(error), error.status)
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 128 + signal.SIGINT)
    except ValueError as error:
        return _fail(error, str(error), 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        reason = "is a file, expected a directory" if isinstance(error, FileExistsError) else error.strerror or error
        return _fail(error, f"{place}{reason}", 1)
    return 0


def _fail(error: BaseException, message: str, status: int) -> int:
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    line = " ".join(message.split()) or "failed without a message"
    print(f"{'error' if status < 128 else 'stopped'}: {line}", file=sys.stderr, flush=True)
    return status


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
