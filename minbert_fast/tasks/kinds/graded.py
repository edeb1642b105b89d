# SPDX-License-Identifier: Apache-2.0
"""Shared by kinds with numbers as labels: the range of the labels.

Heads compare with targets t = (label - low) / (high - low), from 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from minbert_fast.common.schema import ConfigError, check
from minbert_fast.data.label_summary import LabelSummary
from minbert_fast.data.labels import Numbers, Rule
from minbert_fast.tasks.base import Task, TaskOptions

MAX_LEVELS = 101  # whole labels of a range that a loss over classes can tell apart
OVER_LEVELS = ("cross_entropy", "ordinal")  # losses that need whole labels


@dataclass(frozen=True)
class RangeOptions(TaskOptions):
    """Options of a task with numbers as labels."""

    range: tuple[float, float] | None = None  # smallest and largest valid label, also of predictions; unset: no bounds
    found_range: tuple[float, float] | None = None  # without `range`: the smallest and the largest training label
    rounded: bool = False  # predict whole labels
    loss: str = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("range", "found_range"):
            ends = getattr(self, name)
            check(ends is None or ends[0] < ends[1], f"{name} = {ends}: expected [low, high] with low < high")
        if self.loss in OVER_LEVELS and (self.range or self.found_range):
            _ = self.levels  # raises ConfigError

    @property
    def limits(self) -> tuple[float, float]:
        """The labels of the targets 0 and 1."""
        return self.range or self.found_range or (0.0, 1.0)

    @property
    def levels(self) -> int:
        """The number of whole labels from low to high. Raises ConfigError if low and high are not whole numbers apart."""
        low, high = self.limits
        whole = float(high - low).is_integer() and high - low < MAX_LEVELS
        check(whole, f"range = [{low:g}, {high:g}]: this loss expects up to {MAX_LEVELS} whole labels, such as [0, 5]")
        return int(high - low) + 1


def to_unit(labels: Tensor, limits: tuple[float, float]) -> Tensor:
    """Labels as targets: `limits` become 0 and 1."""
    low, high = limits
    t = labels - low if low else labels
    return t if high - low == 1 else t / (high - low)


def from_unit(t: Tensor, limits: tuple[float, float]) -> Tensor:
    """The inverse of `to_unit`."""
    low, high = limits
    label = t * (high - low)
    return label + low if low else label


class NumberTask(Task):
    """A task whose label is a number."""

    metric: ClassVar[str] = "pearson"
    reported: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mae")

    @property
    def rule(self) -> Rule | None:
        return Numbers(*(self.options.range or ()))

    @property
    def resolved(self) -> bool:
        return self.options.range is not None or self.options.found_range is not None

    def resolve(self, summary: LabelSummary) -> dict[str, Any]:
        if self.resolved:
            return {}
        where = f"tasks.{self.name}"
        if summary.low is None or summary.high is None:
            problem = "the labels are not all numbers" if summary.rows else "no row has a label"
            raise ConfigError(f"{where}: {problem}; expected numbers, or a kind of classification")
        if summary.low == summary.high:
            raise ConfigError(f"{where}: every label is {summary.low:g}; expected different numbers")
        return {"found_range": [summary.low, summary.high]}
