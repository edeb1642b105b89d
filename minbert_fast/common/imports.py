# SPDX-License-Identifier: Apache-2.0
"""Runs a user's Python files that register tasks of their own (`--import FILE.py`).

A recipe, and so a model directory, records the name and SHA-256 of such a file, never its path or content: a model asks
for the file and does not bring code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minbert_fast.common.schema import ConfigError
from minbert_fast.common.storage import regular

_digests: dict[str, str] = {}  # of the files that this process has run, by name


def import_file(path: Path) -> str:
    """Runs a Python file once in this process; returns the SHA-256 of its content.

    Raises ConfigError in one line if the file cannot be read or fails, or if another file of this name was run.
    """
    try:
        digest = hashlib.sha256(regular(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"--import {path}: cannot be read ({error.strerror})") from None
    if _digests.get(path.name) == digest:
        return digest
    module = f"minbert_fast_imported_{path.stem}"
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--import {path}: expected a Python file, FILE.py")
    if path.name in _digests:
        raise ConfigError(f"--import {path}: another {path.name} was imported before")
    sys.modules[module] = found = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(found)
    except Exception as error:
        del sys.modules[module]
        raise ConfigError(f"--import {path}: {type(error).__name__}: {error}") from error
    _digests[path.name] = digest
    return digest


class ImportAction(argparse.Action):
    """Imports each file where the command line names it; the option's value maps file names to digests."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: Any = None
    ) -> None:
        path = Path(values)
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), path.name: import_file(path)})


def missing(recorded: Mapping[str, str]) -> list[str]:
    """The recorded files that this process has not run. Warns about a file that has changed since it was recorded."""
    for name, digest in recorded.items():
        if _digests.get(name, digest) != digest:
            warnings.warn(f"{name} is not the file that the model was trained with: it has changed", stacklevel=2)
    return [name for name in recorded if name not in _digests]
