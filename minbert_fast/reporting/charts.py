# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG text: lines, points and matrices, small enough to live inside a page or as files of their own.

Colours come from CSS variables, so that one drawing serves light, dark and paper. Series differ by dash as well as by
colour. Nothing is shown on hover only. Units are those of the view box; text stays readable down to 320 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 10, 40
LINE, CHARACTER = 18, 7.1  # height of a legend row and typical width of a letter at 13 units
COLOURS = 6
MAX_POINTS = 400  # a line; more are averaged in bins
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 5")

STYLE = """
:root { --paper: #fff; --ink: #1a1d21; --muted: #59616b; --grid: #dfe3e8; --heat: 37 99 235;
  --s0: #1d5fd1; --s1: #b8500a; --s2: #0b7a55; --s3: #7a3fc4; --s4: #b3264a; --s5: #0e7490; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8eaed; --muted: #a3abb5; --grid: #333a43;
  --heat: 96 150 255; --s0: #79a8ff; --s1: #f0a05a; --s2: #4fcb9d; --s3: #bf9bff; --s4: #ff8aa3; --s5: #5cc8df; } }
@media print { :root { --paper: #fff; --ink: #000; --muted: #444; --grid: #ccc; --heat: 37 99 235;
  --s0: #1d5fd1; --s1: #b8500a; --s2: #0b7a55; --s3: #7a3fc4; --s4: #b3264a; --s5: #0e7490; } }
svg.chart text { font: 12px system-ui, sans-serif; fill: var(--muted); }
svg.chart text.strong { fill: var(--ink); }
@media (max-width: 32rem) { svg.chart text { font-size: 14px; } svg.chart text.strong { font-size: 13px; } }
svg.chart .grid { stroke: var(--grid); stroke-width: 1; }
svg.chart .zero { stroke: var(--muted); stroke-width: 1; }
svg.chart .mark { stroke: var(--muted); stroke-dasharray: 2 4; }
svg.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg.chart .faint { fill: none; stroke-width: 1; opacity: 0.35; }
svg.chart .points { fill: none; stroke-width: 6; stroke-linecap: round; }
svg.chart .cloud { fill: none; stroke-width: 4; stroke-linecap: round; opacity: 0.45; }
svg.chart .cell { stroke: var(--grid); }
""" + "\n".join(f"svg.chart .s{i} {{ stroke: var(--s{i}); }}" for i in range(COLOURS))


@dataclass(frozen=True)
class Series:
    """One line: x ascending [n] and y [n] (nan: a gap), its name, and whether each point is marked."""

    name: str
    x: np.ndarray
    y: np.ndarray
    marked: bool = False
    smooth: bool = False  # draw a running mean over the values, which stay visible behind it


@dataclass(frozen=True)
class _Frame:
    """Where data coordinates lie in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float

    def px(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - self.top)


def lines(
    label: str,
    series: Sequence[Series],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
) -> str:
    """A line chart described by `label`; `marks` are x positions of dotted vertical lines (stages begin there)."""
    shown = [s for s in series if np.isfinite(s.y).any()]
    if not shown:
        return _empty(label)
    xs = np.concatenate([s.x for s in shown])
    ys = np.concatenate([s.y[np.isfinite(s.y)] for s in shown])
    legend, height = _legend([s.name for s in shown]) if len(shown) > 1 else ("", 0.0)
    low, high = (float(ys.min()), float(ys.max())) if y_range is None else y_range
    frame = _Frame(_widen(float(xs.min()), float(xs.max()), 0.0), _widen(low, high, 0.06), TOP + height)
    parts = [legend, _axes(frame, x_label)]
    for mark in marks:
        parts.append(_segment("mark", frame.px(mark), frame.top, frame.px(mark), HEIGHT - BOTTOM))
    for index, one in enumerate(shown):
        colour, dash = f"s{index % COLOURS}", DASHES[index % len(DASHES)]
        x, y = thin(one.x, one.y)
        if one.smooth:
            parts.append(f'<path class="faint {colour}" d="{_path(frame, x, y)}"/>')
            y = running_mean(y)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path class="line {colour}"{dashes} d="{_path(frame, x, y)}"/>')
        dots = np.isfinite(y) if one.marked else _alone(y)
        if dots.any():
            parts.append(f'<path class="points {colour}" d="{_dots(frame, x[dots], y[dots])}"/>')
    return _svg(label, "".join(parts))


def cloud(
    label: str, x: np.ndarray, y: np.ndarray, x_label: str, y_label: str, limits: tuple[float, float], most: int = 2000
) -> str:
    """Points x against y, both within `limits`, with the diagonal; an even choice of `most` points."""
    if len(x) == 0:
        return _empty(label)
    chosen = np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int)
    frame = _Frame(_widen(*limits, 0.03), _widen(*limits, 0.03), TOP + LINE)
    low, high = limits
    parts = [
        f'<text class="strong" x="{LEFT}" y="{TOP + 10}">{escape(y_label)}</text>',
        _axes(frame, x_label),
        _segment("mark", frame.px(low), frame.py(low), frame.px(high), frame.py(high)),
        f'<path class="cloud s0" d="{_dots(frame, x[chosen], y[chosen])}"/>',
    ]
    return _svg(label, "".join(parts))


def matrix(label: str, values: np.ndarray, names: Sequence[str], form: Callable[[float], str]) -> str:
    """A confusion matrix [C, C], rows the truth, each cell shaded by its share of the row and labelled by `form`."""
    count = len(names)
    rows = list(names) if count <= 2 else [f"{i} {name}" for i, name in enumerate(names)]
    left, top = max(120.0, 12 + 1.1 * CHARACTER * max(map(len, rows), default=0)), 44.0
    width, height = (WIDTH - left - RIGHT) / count, (HEIGHT - top - 8) / count
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-12)
    parts = [f'<text x="{left}" y="14">predicted</text>', '<text x="4" y="32">truth</text>']
    for i, name in enumerate(names):
        short = name if count <= 2 else str(i)
        parts.append(_text(left + (i + 0.5) * width, 32, short, "middle"))
        parts.append(_text(left - 8, top + (i + 0.5) * height + 4, rows[i], "end"))
        for j in range(count):
            fill = f"fill: rgb(var(--heat) / {0.6 * shares[i, j]:.3f})"
            x, y = left + j * width, top + i * height
            parts.append(
                f'<rect class="cell" style="{fill}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )
            parts.append(_text(x + width / 2, y + height / 2 + 4, form(float(values[i, j])), "middle", "strong"))
    return _svg(label, "".join(parts))


def standalone(svg: str) -> str:
    """A chart as an SVG file of its own, with its colours and a background."""
    head, body = svg.split(">", 1)
    background = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{escape(STYLE, quote=False)}</style>{background}{body}\n'


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: means over bins of equal count; a bin of gaps alone stays a gap."""
    if len(x) <= MAX_POINTS:
        return x, y
    bins = np.array_split(np.arange(len(x)), MAX_POINTS)
    means = [np.nanmean(y[b]) if np.isfinite(y[b]).any() else np.nan for b in bins]
    return np.array([x[b].mean() for b in bins]), np.array(means)


def running_mean(y: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Centred mean over a window of `share` of the points, gaps left out."""
    reach = max(1, round(len(y) * share / 2))
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(y))
    begin, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(y))
    total = counts[end] - counts[begin]
    means: np.ndarray = np.where(total > 0, (sums[end] - sums[begin]) / np.maximum(total, 1), np.nan)
    return means


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value as an axis shows it."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-2:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _widen(low: float, high: float, share: float) -> tuple[float, float]:
    if high <= low:  # one point, or a constant
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    margin = (high - low) * share
    return low - margin, high + margin


def _axes(frame: _Frame, x_label: str) -> str:
    parts = []
    for value in ticks(*frame.y):
        y = frame.py(value)
        parts.append(_segment("zero" if value == 0 else "grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(LEFT - 6, y + 4, number(value), "end"))
    for value in ticks(*frame.x):
        text, x = number(value), frame.px(value)
        fits = x + CHARACTER * len(text) / 2 <= WIDTH
        parts.append(_text(x if fits else WIDTH, HEIGHT - BOTTOM + 16, text, "middle" if fits else "end"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, x_label, "end"))
    return "".join(parts)


def _legend(names: Sequence[str]) -> tuple[str, float]:
    """The legend above a chart, in rows, and its height."""
    parts = []
    x, y = float(LEFT), TOP + 10.0
    for index, name in enumerate(names):
        width = 30 + CHARACTER * len(name) + 12
        if x > LEFT and x + width > WIDTH - RIGHT + 12:
            x, y = float(LEFT), y + LINE
        dash = DASHES[index % len(DASHES)]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path class="line s{index % COLOURS}"{dashes} d="M{x:.0f} {y - 4:.0f}h24"/>')
        parts.append(_text(x + 30, y, name, "start", "strong"))
        x += width
    return "".join(parts), y - TOP + 8


def _path(frame: _Frame, x: np.ndarray, y: np.ndarray) -> str:
    parts, pen = [], "M"
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(b):
            pen = "M"
            continue
        parts.append(f"{pen}{frame.px(a):.1f} {frame.py(b):.1f}")
        pen = "L"
    return "".join(parts)


def _alone(y: np.ndarray) -> np.ndarray:
    """Which values have a gap or an end on either side: no line shows them [n]."""
    known = np.concatenate([[False], np.isfinite(y), [False]])
    alone: np.ndarray = known[1:-1] & ~known[:-2] & ~known[2:]
    return alone


def _dots(frame: _Frame, x: np.ndarray, y: np.ndarray) -> str:
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    return "".join(f"M{frame.px(a):.1f} {frame.py(b):.1f}h0" for a, b in pairs if math.isfinite(b))


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _empty(label: str) -> str:
    return _svg(label, _text(WIDTH / 2, HEIGHT / 2, "no values", "middle"))


def _svg(label: str, body: str) -> str:
    head = f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f"{head}>{body}</svg>"
