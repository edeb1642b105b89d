# SPDX-License-Identifier: Apache-2.0
"""Charts as SVG text (lines, scattered points, bars, matrices) for the report page and for files.

CSS variables set the colours, so one drawing works in light mode, dark mode and print. Series differ by dash pattern and
colour. No value is visible on hover only. Units are those of the view box; text stays readable down to 320 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 10, 40
LINE, CHARACTER = 18, 7.1  # height of a legend row and typical width of a letter at font size 13
COLOURS = 6
MAX_POINTS = 400  # per line; longer series are averaged in bins
MAX_SCATTERED = 2000  # points of a scatter chart
SMOOTHING = 0.06  # window of the running mean, as a share of the points
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4", "1 5")

STYLE = """
:root { --paper: #fff; --ink: #1a1d21; --muted: #59616b; --grid: #dfe3e8; --heat: 37 99 235;
  --s0: #1d5fd1; --s1: #b8500a; --s2: #0b7a55; --s3: #7a3fc4; --s4: #b3264a; --s5: #0e7490; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e8eaed; --muted: #a3abb5; --grid: #333a43;
  --heat: 96 150 255; --s0: #79a8ff; --s1: #f0a05a; --s2: #4fcb9d; --s3: #bf9bff; --s4: #ff8aa3; --s5: #5cc8df; } }
@media print { :root { --ink: #000; --muted: #444; --grid: #ccc; } }
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
svg.chart .bars { fill: none; }
svg.chart .cell { stroke: var(--grid); }
""" + "\n".join(f"svg.chart .s{i} {{ stroke: var(--s{i}); }}" for i in range(COLOURS))


@dataclass(frozen=True)
class Series:
    """One line: ascending x [n] and y [n], where nan makes a gap."""

    name: str
    x: np.ndarray
    y: np.ndarray
    marked: bool = False  # draw a dot at every point
    smooth: bool = False  # draw the running mean, with the values faint behind it
    joined: bool = True  # False: dots alone, in any order


@dataclass(frozen=True)
class _Frame:
    """Maps data coordinates, with ranges x and y, to positions in the drawing below `top`."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float

    def px(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def py(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - self.top)


def line_chart(
    label: str,
    series: Sequence[Series],
    x_label: str,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """A line chart with `label` as its accessible description; `marks` are x positions of dotted vertical lines.

    `x_ticks` are (position, text) on the x axis; None chooses round values.
    """
    shown = [s for s in series if np.isfinite(s.y).any()]
    if not shown:
        return _svg(label, _text(WIDTH / 2, HEIGHT / 2, "no values", "middle"))
    xs = np.concatenate([s.x for s in shown])
    ys = np.concatenate([s.y[np.isfinite(s.y)] for s in shown])
    legend, height = _legend([s.name for s in shown], [s.joined for s in shown]) if len(shown) > 1 else ("", 0.0)
    low, high = (float(ys.min()), float(ys.max())) if y_range is None else y_range
    margin = 0.0 if x_ticks is None else 0.06
    frame = _Frame(_padded(float(xs.min()), float(xs.max()), margin), _padded(low, high, 0.06), TOP + height)
    parts = [legend, _axes(frame, x_label, x_ticks)]
    parts += [_segment("mark", frame.px(mark), frame.top, frame.px(mark), HEIGHT - BOTTOM) for mark in marks]
    for index, one in enumerate(shown):
        colour = f"s{index % COLOURS}"
        if not one.joined:
            parts.append(f'<path class="points {colour}" d="{_dots(frame, one.x, one.y)}"/>')
            continue
        x, y = downsample(one.x, one.y)
        if one.smooth:
            parts.append(f'<path class="faint {colour}" d="{_path(frame, x, y)}"/>')
            y = running_mean(y)
        parts.append(_line(index, _path(frame, x, y)))
        dots = np.isfinite(y) if one.marked else _isolated(y)
        if dots.any():
            parts.append(f'<path class="points {colour}" d="{_dots(frame, x[dots], y[dots])}"/>')
    return _svg(label, "".join(parts))


def scatter_chart(label: str, x: np.ndarray, y: np.ndarray, limits: tuple[float, float], trend: Series) -> str:
    """The truth x [n] against predictions y [n], n > 0, within `limits`, with the diagonal; at most MAX_SCATTERED,
    evenly chosen.

    `trend` is a line through the points, with its name in the legend.
    """
    chosen = np.linspace(0, len(x) - 1, min(MAX_SCATTERED, len(x))).round().astype(int)
    frame = _Frame(_padded(*limits, 0.03), _padded(*limits, 0.03), TOP + LINE)
    low, high = frame.x
    parts = [
        f'<text class="strong" x="{LEFT}" y="{TOP + 10}">predicted</text>',
        _axes(frame, "truth"),
        _segment("mark", frame.px(low), frame.py(low), frame.px(high), frame.py(high)),
        f'<path class="cloud s0" d="{_dots(frame, x[chosen], y[chosen])}"/>',
        f'<path class="line s1" d="{_path(frame, trend.x, trend.y)}"/>',
        f'<path class="points s1" d="{_dots(frame, trend.x, trend.y)}"/>',
        f'<path class="line s1" d="M{WIDTH - RIGHT - CHARACTER * len(trend.name) - 30:.0f} {TOP + 6}h24"/>',
        _text(WIDTH - RIGHT, TOP + 10, trend.name, "end", "strong"),
    ]
    return _svg(label, "".join(parts))


def bar_chart(label: str, series: Sequence[tuple[str, np.ndarray]], names: Sequence[str], x_label: str) -> str:
    """Bars in groups, one group for each of `names`: series (name, shares [groups]) of values from 0 to 1."""
    legend, height = _legend([name for name, _ in series], [False] * len(series))
    top = max((float(values.max()) for _, values in series if len(values)), default=0.0)
    frame = _Frame((0.0, float(len(names))), (0.0, 1.06 * top or 1.0), TOP + height)
    ticks = [(i + 0.5, name) for i, name in enumerate(names)]
    parts = [legend, _axes(frame, x_label, ticks, "{:.0%}".format)]
    width = 0.8 * (frame.px(1.0) - frame.px(0.0)) / len(series)
    for index, (_, values) in enumerate(series):
        for group, value in enumerate(values.tolist()):
            x = frame.px(group + 0.1) + (index + 0.5) * width
            path = f"M{x:.1f} {frame.py(0.0):.1f}V{frame.py(value):.1f}"
            parts.append(f'<path class="bars s{index % COLOURS}" style="stroke-width: {0.9 * width:.1f}" d="{path}"/>')
    return _svg(label, "".join(parts))


def matrix_chart(label: str, values: np.ndarray, names: Sequence[str], form: Callable[[float], str]) -> str:
    """A confusion matrix [C, C] with true classes as rows; cells are shaded by row share and labelled by `form`."""
    count = len(names)
    rows = list(names) if count <= 2 else [f"{i} {name}" for i, name in enumerate(names)]
    left, top = max(120.0, 12 + 1.1 * CHARACTER * max(map(len, rows))), 44.0
    width, height = (WIDTH - left - RIGHT) / count, (HEIGHT - top - 8) / count
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1e-12)
    parts = [f'<text x="{left}" y="14">predicted</text>', '<text x="4" y="32">truth</text>']
    for i, name in enumerate(names):
        parts.append(_text(left + (i + 0.5) * width, 32, name if count <= 2 else str(i), "middle"))
        parts.append(_text(left - 8, top + (i + 0.5) * height + 4, rows[i], "end"))
        for j in range(count):
            fill = f"fill: rgb(var(--heat) / {0.6 * shares[i, j]:.3f})"
            x, y = left + j * width, top + i * height
            parts.append(
                f'<rect class="cell" style="{fill}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )
            parts.append(_text(x + width / 2, y + height / 2 + 4, form(float(values[i, j])), "middle", "strong"))
    return _svg(label, "".join(parts))


def standalone_svg(svg: str) -> str:
    """A chart as the text of an SVG file, with its colours and a background."""
    head, body = svg.split(">", 1)
    background = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{escape(STYLE, quote=False)}</style>{background}{body}\n'


def downsample(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: means over bins of equal count, without nan; a bin of nan alone stays nan."""
    if len(x) <= MAX_POINTS:
        return x, y
    bins = np.array_split(np.arange(len(x)), MAX_POINTS)
    means = [np.nanmean(y[b]) if np.isfinite(y[b]).any() else np.nan for b in bins]
    return np.array([x[b].mean() for b in bins]), np.array(means)


def running_mean(y: np.ndarray) -> np.ndarray:
    """Centred mean [n] over a window of SMOOTHING * n points, without nan."""
    reach = max(1, round(len(y) * SMOOTHING / 2))
    known, window = np.isfinite(y), np.ones(2 * reach + 1)
    sums, counts = (np.convolve(v, window)[reach : reach + len(y)] for v in (np.where(known, y, 0.0), known))
    return np.asarray(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))


def round_ticks(low: float, high: float) -> list[float]:
    """About five round values (multiples of 1, 2 or 5 times a power of ten) within [low, high]."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def format_tick(value: float) -> str:
    """A value as an axis shows it."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-2:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with a margin of `share` on both sides; a single value gets a margin of 10 %."""
    margin = (high - low) * share if high > low else abs(low) * 0.1 or 1.0
    return low - margin, max(low, high) + margin


def _axes(
    frame: _Frame,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    form: Callable[[float], str] = format_tick,
) -> str:
    """Grid lines with their values in `form`, and the x axis with `x_ticks` (None: round values)."""
    parts = []
    for value in round_ticks(*frame.y):
        y = frame.py(value)
        parts.append(_segment("zero" if value == 0 else "grid", LEFT, y, WIDTH - RIGHT, y))
        parts.append(_text(LEFT - 6, y + 4, form(value), "end"))
    for value, text in [(v, format_tick(v)) for v in round_ticks(*frame.x)] if x_ticks is None else x_ticks:
        x = frame.px(value)
        fits = x + CHARACTER * len(text) / 2 <= WIDTH
        parts.append(_text(x if fits else WIDTH, HEIGHT - BOTTOM + 16, text, "middle" if fits else "end"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, x_label, "end"))
    return "".join(parts)


def _legend(names: Sequence[str], joined: Sequence[bool]) -> tuple[str, float]:
    """The legend above a chart, broken into rows, and its height. A series that is not `joined` has a dot, not a line."""
    parts = []
    x, y = float(LEFT), TOP + 10.0
    for index, name in enumerate(names):
        width = 30 + CHARACTER * len(name) + 12
        if x > LEFT and x + width > WIDTH - RIGHT + 12:
            x, y = float(LEFT), y + LINE
        dot = f'<path class="points s{index % COLOURS}" d="M{x + 12:.0f} {y - 4:.0f}h0"/>'
        drawn = _line(index, f"M{x:.0f} {y - 4:.0f}h24") if joined[index] else dot
        parts += [drawn, _text(x + 30, y, name, "start", "strong")]
        x += width
    return "".join(parts), y - TOP + 8


def _line(index: int, path: str) -> str:
    """A line in the colour and dash pattern of series number `index`."""
    dash = DASHES[(index + index // COLOURS) % len(DASHES)]  # the seventh has the first one's colour, not its dashes
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path class="line s{index % COLOURS}"{dashes} d="{path}"/>'


def _path(frame: _Frame, x: np.ndarray, y: np.ndarray) -> str:
    parts, pen = [], "M"
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(b):
            parts.append(f"{pen}{frame.px(a):.1f} {frame.py(b):.1f}")
        pen = "L" if math.isfinite(b) else "M"
    return "".join(parts)


def _isolated(y: np.ndarray) -> np.ndarray:
    """Mask [n] of the values between two gaps or ends, which a line alone would not show."""
    known = np.concatenate([[False], np.isfinite(y), [False]])
    isolated: np.ndarray = known[1:-1] & ~known[:-2] & ~known[2:]
    return isolated


def _dots(frame: _Frame, x: np.ndarray, y: np.ndarray) -> str:
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    return "".join(f"M{frame.px(a):.1f} {frame.py(b):.1f}h0" for a, b in pairs if math.isfinite(b))


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(label: str, body: str) -> str:
    head = f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f"{head}>{body}</svg>"
