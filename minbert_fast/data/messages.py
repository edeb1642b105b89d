# SPDX-License-Identifier: Apache-2.0
"""Errors about data files, one line each with the place and the reason; bad rows, and how many a file may have."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A data or tokenizer file cannot be used; the message is one line with the place and the reason."""


@dataclass(frozen=True)
class BadRow:
    """A row that was read but not used. `str()` gives `file:line: reason`."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{show_path(self.path)}:{self.line}: {self.reason}"


def check_bad_rows(path: Path, read: int, bad: int, first: BadRow | None, limit: float) -> None:
    """Raises DataError if the share of bad rows reaches `limit`, or if no good row is left."""
    if read == 0:
        raise DataError(f"{show_path(path)}: no rows after the header")
    if bad and (bad >= limit * read or bad == read):
        tolerated = "" if limit == 1 else f"; fewer than {limit:.1%} are tolerated"
        raise DataError(
            f"{show_path(path)}: {bad:,} of {read:,} rows are bad ({bad / read:.1%}{tolerated}), the first at {first}"
        )


def show(value: object, limit: int = 60) -> str:
    """A value for a message: on one line, text in quotes, cut to `limit` characters."""
    if isinstance(value, str):
        return ascii(value) if len(value) <= limit else f"{value[:limit]!a}..."
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def show_path(path: os.PathLike[str] | str) -> str:
    """A path for a message: unchanged if printable, else quoted."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)
