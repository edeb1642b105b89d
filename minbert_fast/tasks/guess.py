# SPDX-License-Identifier: Apache-2.0
"""Guesses the kind of a task from its data: how many texts a row has, and what its labels look like."""

from __future__ import annotations

import re

from minbert_fast.common.schema import ConfigError
from minbert_fast.data.label_summary import LabelSummary
from minbert_fast.data.labels import label_number

FEW = 20  # up to so many different whole numbers are classes, more are a scale
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
SHOWN = 5  # classes named in the reason


def guess_kind(summary: LabelSummary, texts: int) -> tuple[str, str]:
    """The kind of a task with `texts` texts per row and such labels, and the reason as one line for the user.

    Without labelled rows: `contrastive` for one text, else `ranking`. Raises ConfigError if no kind fits.
    """
    if not summary.rows:
        if texts == 1:
            return "contrastive", "texts without labels: each is compared with itself under another dropout"
        return "ranking", f"{texts} texts without labels: the second belongs to the first"
    if texts > 2:
        raise ConfigError(f"{texts} texts and a label: expected one or two texts, or no label")
    one, two = ("classification", "regression") if texts == 1 else ("pair-classification", "pair-regression")
    if summary.lists:
        if texts == 2:
            raise ConfigError(
                "two texts and a list of labels: no kind of task has both; expected one text, or one label"
            )
        return "multilabel", "a label is a list"
    count, names = len(summary.counts), summary.names()
    if summary.low is None:
        comma = next(filter(_DECIMAL_COMMA.fullmatch, names), "")
        if comma and all(_DECIMAL_COMMA.fullmatch(name) or label_number(name) is not None for name in names):
            raise ConfigError(
                f"the labels are numbers, some with a decimal comma ({comma}): write them with a decimal point; "
                f'if they are classes, choose the kind "{one}"'
            )
        if count and count * 2 <= max(summary.rows, 2 * FEW):
            shown = ", ".join(names[:SHOWN]) + (", ..." if count > SHOWN else "")
            return one, f"{count} different labels ({shown})"
        many = f"{count:,}" if count else "too many"
        raise ConfigError(f"{many} different labels in {summary.rows:,} rows, not numbers: expected classes or numbers")
    if summary.whole and 0 < count <= FEW:
        numbers = all(label_number(name) is not None for name in names)  # true and false are none
        found = "whole numbers as labels" if numbers else "labels"
        return one, f"{count} different {found} ({', '.join(names[:SHOWN])}{', ...' * (count > SHOWN)})"
    return two, f"labels are numbers from {summary.low:g} to {summary.high:g}"
