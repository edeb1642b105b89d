# SPDX-License-Identifier: Apache-2.0
"""The installed command `minbert-fast`: starts one of the package's commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from minbert_fast.common import cli
from minbert_fast.common.schema import ConfigError
from minbert_fast.common.version import __version__

# Module below minbert_fast and purpose of each command. Only the chosen one is imported.
COMMANDS = {
    "train": ("train", "train a multitask model"),
    "evaluate": ("evaluate", "score a trained model on labelled files"),
    "predict": ("predict", "write a model's predictions for a file"),
    "encode": ("encode", "write the vectors of sentences"),
    "export": ("export", "write a model in the format of another library"),
    "search": ("search", "search for the best values of a recipe"),
    "compare": ("compare", "compare multitask methods over seeds"),
    "reproduce": ("reproduce", "run published experiments again"),
    "recipes": ("recipes.__main__", "list recipes, show one"),
    "report": ("report", "rewrite a run's report, compare runs"),
    "env": ("env", "print the facts that a bug report needs"),
}


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [f"usage: {cli.SCRIPT} COMMAND [flags]", "", *lines, "", f"{cli.SCRIPT} COMMAND --help lists its flags."]
    )


def main(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names with the others. Raises what that command raises."""
    name, *others = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"minbert_fast {__version__}")
    elif name not in COMMANDS:
        raise ConfigError(
            f"{name!r}: no such command{cli.did_you_mean(name, COMMANDS)}; {cli.SCRIPT} --help lists them"
        )
    else:
        importlib.import_module(f"minbert_fast.{COMMANDS[name][0]}").main(others)


def script() -> int:
    """The entry point of the installed command; returns the exit status."""
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(script())
