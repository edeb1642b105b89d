# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table that a page shows; a new number changes no line but its own."""
    return [_line(head), "|" + "---|" * len(head), *map(_line, rows)]


def aligned_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that a terminal shows: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def aligned(cells: Sequence[str]) -> list[str]:
        first, *others = zip(cells, widths, strict=True)
        return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([_line(aligned(head)), rule, *(_line(aligned(row)) for row in rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
