# SPDX-License-Identifier: Apache-2.0
"""The step suite's results as drawings: speed by candidate as bars, milliseconds over tokens as a line.

Each is an SVG that follows a reader's light or dark colours, with the fonts and colours of a run's own report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from minbert_fast.reporting import charts

ROW, NAMES, WIDTH = 22, 190, 640  # a bar's height, the names' column and the drawing's width


def bars(label: str, groups: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """Horizontal bars from zero: a heading and (name, value) each for every group, whose longest bar fills the width.

    Names that begin with "ours" stand out.
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
    """Real tokens a second of every candidate with gradient surgery, by shape."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        if row["case"].endswith("3 x 32 examples, pcgrad") and row["tokens_per_second"]:
            shape = row["case"].split(",")[0]
            groups.setdefault(f"{shape}: real tokens a second", []).append((row["name"], row["tokens_per_second"]))
    return bars(
        "Real tokens a second of each way to take a step", {k: sorted(v, key=_value) for k, v in groups.items()}
    )


def scaling(rows: Sequence[Mapping[str, Any]]) -> str:
    """Milliseconds of our step over the tokens in a batch of three tasks, and the straight line nearest to them."""
    found = sorted((row["tokens"], row["median"]) for row in rows if row["name"] == "ours, more examples")
    x, y = (np.array(column, dtype=float) for column in zip(*found, strict=True))
    each, base = np.polyfit(x, y, 1, w=1 / y)  # each point weighed by its own size
    ends = np.array([0.0, x[-1]])
    series = [
        charts.Series("milliseconds a step", x, y, marked=True),
        charts.Series(f"{base:.0f} + {each:.3f} x tokens", ends, base + each * ends),
    ]
    return charts.standalone_svg(
        charts.line_chart("Milliseconds a step over tokens a batch", series, "tokens a batch", (0.0, max(y)))
    )


def _value(bar: tuple[str, float]) -> float:
    return bar[1]
