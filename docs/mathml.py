# SPDX-License-Identifier: Apache-2.0
"""MkDocs hook: formulas between double dollar signs become MathML when the site is built, so no page loads a script."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its display formulas converted."""
    return re.sub(r"\$\$(.+?)\$\$", _formula, markdown, flags=re.S)


def _formula(found: re.Match[str]) -> str:
    return f'\n\n<div class="formula">{convert(found[1].strip(), display="block")}</div>\n\n'
