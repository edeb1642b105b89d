# SPDX-License-Identifier: Apache-2.0
"""Figures of the step suite: speed by candidate as bars, milliseconds over tokens as a line.

The figures are SVG files with the fonts and the light and dark colours of a run's report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from minbert_fast.reporting import charts

ROW, NAMES, WIDTH = 22, 190, 640  # height of a row, width of the names, width of the drawing


def bar_chart(label: str, groups: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """Horizontal bars of (name, value) under the heading of each group; a group's longest bar fills the width.

    Names that begin with "ours" are coloured.
    """
    parts, y = [], 8.0
    for heading, entries in groups.items():
        scale = (WIDTH - NAMES - 80) / max(value for _, value in entries)
        y += ROW
        parts.append(f'<text class="strong" x="8" y="{y - 6:.0f}" font-weight="600">{escape(heading)}</text>')
        for name, value in entries:
            colour = "--s0" if name.startswith("ours") else "--muted"
            parts.append(
                f'<text class="strong" x="{NAMES - 8}" y="{y + 15:.0f}" text-anchor="end">{escape(name)}</text>'
            )
            parts.append(
                f'<rect x="{NAMES}" y="{y + 3:.0f}" width="{max(1.0, value * scale):.1f}" height="{ROW - 6}" '
                f'style="fill: var({colour})"/>'
            )
            parts.append(f'<text x="{NAMES + value * scale + 6:.1f}" y="{y + 15:.0f}">{value:,.0f}</text>')
            y += ROW
    head = f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {y + 10:.0f}"'
    return charts.standalone_svg(f"{head}>{''.join(parts)}</svg>")


def speeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars of tokens per second (without padding) of every candidate with gradient surgery, by shape."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row["case"].endswith("3 x 32 examples, pcgrad") and row["tokens_per_second"]:
            shape = row["case"].split(",")[0]
            groups.setdefault(f"{shape}: real tokens a second", []).append((row["name"], row["tokens_per_second"]))
    ordered = {shape: sorted(bars, key=lambda bar: bar[1]) for shape, bars in groups.items()}
    return bar_chart("Real tokens a second of each way to take a step", ordered)


def scaling(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of our step over the tokens of a batch of three tasks, and the line fitted to them."""
    found = sorted((row["tokens"], row["median"]) for row in rows if row["name"] == "ours, more examples")
    x, y = (np.array(column, dtype=float) for column in zip(*found, strict=True))
    each, base = np.polyfit(x, y, 1, w=1 / y)  # weights for relative errors
    ends = np.array([0.0, x[-1]])
    series = [
        charts.Series("milliseconds a step", x, y, marked=True),
        charts.Series(f"{base:.0f} + {each:.3f} x tokens", ends, base + each * ends),
    ]
    return charts.standalone_svg(
        charts.line_chart("Milliseconds a step over tokens a batch", series, "tokens a batch", (0.0, max(y)))
    )
