# SPDX-License-Identifier: Apache-2.0
"""Elements of a self-contained HTML page: no scripts, no network, readable on a phone, in dark mode and in print.

All functions escape their text, except arguments called `body` or `svg` and values of type Html.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from minbert_fast.common.storage import write_text
from minbert_fast.reporting import charts

STYLE = """
* { box-sizing: border-box; }
:root { color-scheme: light dark; --card: #f6f7f9; }
@media screen and (prefers-color-scheme: dark) { :root { --card: #1c2127; } }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2rem) 4rem; max-width: 74rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
p { max-width: 46rem; margin: 0.5rem 0; }
a { color: var(--s0); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--s0); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; } .skip:focus { left: 1rem; background: var(--paper); padding: 0.5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; list-style: none; margin: 0.8rem 0; padding: 0; }
nav a { display: inline-block; padding: 0.2rem 0; }
.muted { color: var(--muted); }
.banner { background: var(--card); border-left: 4px solid var(--s1); padding: 0.4rem 0.8rem; max-width: none;
  font-size: 0.95rem; }
.banner.worse { border-color: var(--s4); color: var(--s4); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(13.5rem, 1fr)); gap: 0.7rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: 0.5rem; padding: 0.7rem 0.9rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { display: block; }
.tile.worse { border-left: 4px solid var(--s4); } .tile.worse .verdict, .tile.worse b { color: var(--s4); }
.tile.unclear { border-left: 4px solid var(--s1); } .tile.better { border-left: 4px solid var(--s2); }
.verdict { margin-top: 0.4rem; font-weight: 600; font-size: 0.95rem; }
ol { padding-left: 1.4rem; } ol pre { margin: 0.3rem 0 0.7rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border-radius: 0.5rem; padding: 0.7rem; min-width: 0;
  break-inside: avoid; }
figure svg { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption { font-weight: 600; margin-bottom: 0.3rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.4rem 0; }
th, td { text-align: left; padding: 0.3rem 0.7rem 0.3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top;
  overflow-wrap: break-word; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; } th { vertical-align: bottom; }
table.prose td { overflow-wrap: anywhere; min-width: 4.5rem; }
@media (min-width: 32rem) { table.prose td:first-child { white-space: nowrap; } }
th { font-weight: 600; } thead th { color: var(--muted); font-weight: 500; }
table.matrix th, table.matrix td { padding: 0.45rem 0.6rem; text-align: center; border: 1px solid var(--grid); }
table.matrix tbody th { text-align: left; }
@media (max-width: 32rem) { table { font-size: 0.85rem; } th, td { padding-right: 0.4rem; } .bar { --full: 2.5rem; }
  figure { padding: 0.5rem; } .tile { padding: 0.5rem 0.7rem; }
  table.matrix th, table.matrix td { padding: 0.35rem 0.3rem; } }
table.matrix td { background: rgb(var(--heat) / var(--share)); }
.bar { display: block; width: calc(var(--share) * var(--full)); min-width: 1px; height: 0.8rem; margin-top: 0.35rem;
  background: var(--s0); border-radius: 2px; --full: 10rem; }
table.matrix td, .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.errors { list-style: none; padding: 0; margin: 0.4rem 0; display: grid; gap: 0.6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.errors li { background: var(--card); border-radius: 0.5rem; padding: 0.6rem 0.8rem; break-inside: avoid; }
.errors q { display: block; quotes: none; margin: 0.2rem 0; padding-left: 0.6rem; border-left: 3px solid var(--grid); }
pre { background: var(--card); padding: 0.7rem 0.9rem; border-radius: 0.5rem; white-space: pre-wrap; }
summary { cursor: pointer; padding: 0.3rem 0; color: var(--s0); }
@page { margin: 15mm; }
@media print {
  body { font-size: 10pt; padding: 0; max-width: none; }
  nav, .skip { display: none; }
  a { color: inherit; }
  h2, h3, figcaption, summary { break-after: avoid; }
  tr, .tile, .banner, pre { break-inside: avoid; }
  .charts, .errors { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } table { font-size: 9pt; } th, td { padding-right: 0.4rem; }
  details::details-content { display: block; content-visibility: visible; }
  summary { list-style: none; color: inherit; font-weight: 600; }
}
"""


Plots = dict[str, str]  # SVG text by name; its file has the same name, without signs that a path cannot hold


class Html(str):
    """Markup, which is inserted without escaping."""


def document(title: str, sections: Sequence[tuple[str, str]], body: str) -> str:
    """The HTML document: `body`, links to the sections, then the sections (title, body) that are not empty."""
    shown = [(f"{anchor(name)}-{i}", name, content) for i, (name, content) in enumerate(sections) if content]
    links = "".join(f'<li><a href="#{key}">{escape(name)}</a></li>' for key, name, _ in shown)
    parts = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{part}</section>\n' for key, name, part in shown)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{charts.STYLE}{STYLE}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">Skip to the content</a>\n<header>{body}\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main id="main">\n{parts}</main>\n'
        "</body>\n</html>\n"
    )


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]], body: str, plots: Plots) -> Path:
    """Writes the charts to plots/ beside `path`, then a `document` to `path`, and returns `path`.

    The page comes last: where it is complete, so are the charts.
    """
    for name, svg in plots.items():
        file = re.sub(r"[^\w.=+-]", "_", name)  # it may hold the name of a class
        write_text(path.parent / "plots" / f"{file}.svg", charts.standalone_svg(svg))
    write_text(path, document(title, sections, body))
    return path


def anchor(title: str) -> str:
    """The beginning of a section's id; two tasks may have the same one."""
    return "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in title.lower()).split())


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph, with a class if `kind` is given."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def figure(caption: str, svg: str) -> str:
    """A chart with its caption."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def figure_grid(figures: Iterable[str]) -> str:
    """Figures side by side if the window is wide enough."""
    return f'<div class="charts">{"".join(figures)}</div>'


def table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table that scrolls if it is too wide; columns after the first `text_columns` hold numbers."""

    def one(tag: str, text: str, column: int) -> str:
        kind = "" if column < text_columns else ' class="n"'
        return f"<{tag}{kind}>{text if isinstance(text, Html) else escape(text)}</{tag}>"

    heads = "".join(one("th", text, i) for i, text in enumerate(head))
    lines = "".join("<tr>" + "".join(one("td", text, i) for i, text in enumerate(row)) + "</tr>" for row in rows)
    prose = ' class="prose"' if text_columns > 1 else ""
    return scrollable(label, f"<table{prose}><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>")


def scrollable(label: str, body: str) -> str:
    """A wide element that scrolls by touch, wheel or keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'


def collapsible(summary: str, body: str) -> str:
    """Content that a click on `summary` opens."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def format_duration(seconds: float) -> str:
    """A duration for people: 0.8 s, 12 s, 3:05 min, 1:02:03 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"
